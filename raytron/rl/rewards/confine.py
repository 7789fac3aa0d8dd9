"""The script between `sandbox.py` and the program it runs: gives up what the program must not have, then becomes it.

    confine.py ORDER FD     ORDER: JSON of program, env, readable, writable, any_files, limits (RLIMIT name -> value)

What holds afterwards, for the program and whatever it turns into by exec:

    no network      seccomp refuses socket(); where the user may (root), the network namespace is empty besides
    no processes    seccomp refuses fork and the like (threads are allowed), signals to others, tracing, their limits
    files           Landlock (Linux 5.13): reads the interpreter and the system's libraries, writes its own folder;
                    seccomp refuses what Landlock does not see: modes, owners, times, attributes, shared memory
    no privileges   no capability, and none to be had by exec
    limits          CPU time, address space, file size, open files by setrlimit

Refusals are errors (EPERM) for the program. Where one of these cannot be had nothing is run: FD gets the reason and the
exit code is 125. Only Landlock may be done without (any_files); the program's files are then those of the user.

seccomp and not only namespaces, because an ordinary user has no `unshare -n` on many machines, and a namespace keeps
nobody from killing the trainer, which runs as the same user. The filter is classic BPF over `struct seccomp_data`.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Sequence

_LIBC = ctypes.CDLL(None, use_errno=True)

# System calls by machine: the kernel's AUDIT_ARCH, then numbers; 0 is one that the machine does not have.
_MACHINES = {"x86_64": 0, "aarch64": 1}
_ARCH = (0xC000003E, 0xC00000B7)
_REFUSED = {
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "fork": (57, 0),
    "vfork": (58, 0),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "ioprio_set": (251, 30),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "truncate": (76, 45),
    "chmod": (90, 0),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, 0),
    "fchown": (93, 55),
    "lchown": (94, 0),
    "fchownat": (260, 54),
    "utime": (132, 0),
    "utimes": (235, 0),
    "futimesat": (261, 0),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "keyctl": (250, 219),
    "add_key": (248, 217),
}
_CLONE, _CLONE3, _TGKILL, _PRLIMIT = (56, 220), (435, 435), (234, 131), (302, 261)
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # on every machine

_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD, _CLONE_NEWIPC, _CLONE_NEWNET = 0x00010000, 0x08000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_X32 = 0x40000000  # the other numbering that x86-64 kernels may understand
_FILE_RIGHTS, _READ_RIGHTS = 0b100 | 1 | 0b10 | 1 << 14 | 1 << 15, 0b1101


def main(order: dict, report: int) -> None:
    """Confine this process and become the program. Does not return."""
    os.set_inheritable(report, False)  # so that it closes, empty, when the program begins
    try:
        _check(_LIBC.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl(PDEATHSIG)")  # raytron's end is the program's
        _LIBC.unshare(_CLONE_NEWNET | _CLONE_NEWIPC)  # refused to ordinary users; seccomp is what counts
        for name, value in order["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        drop_capabilities()
        _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(NO_NEW_PRIVS)")
        if not restrict_files(order["readable"], order["writable"]) and not order["any_files"]:
            raise OSError(
                "this kernel has no Landlock (Linux 5.13), so the program could write whatever this user may;"
                " Limits(any_files=True) lets it"
            )
        install(syscall_filter(platform.machine(), os.getpid()))
        os.execve(order["program"][0], order["program"], order["env"])
    except BaseException as error:
        os.write(report, f"{type(error).__name__}: {error}".encode())
        os._exit(125)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def drop_capabilities() -> None:
    """Keep none, of the three sets (capget(2), version 3: two words each)."""
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_LIBC.capset(header, none), "capset")


def restrict_files(readable: Sequence[str], writable: Sequence[str]) -> bool:
    """Refuse all files but these trees; whether the kernel can (Landlock)."""
    version = _LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    attributes = struct.pack("Q", rights)
    ruleset = _check(_LIBC.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0), "landlock_create_ruleset")
    for paths, allowed in ((readable, _READ_RIGHTS), (writable, rights)):
        for path in filter(os.path.exists, paths):
            _allow(ruleset, path, allowed if os.path.isdir(path) else allowed & rights & _FILE_RIGHTS)
    _check(_LIBC.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
    return True


def _allow(ruleset: int, path: str, rights: int) -> None:
    tree = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, tree)  # struct landlock_path_beneath_attr is packed
    _check(_LIBC.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule({path})")
    os.close(tree)


def syscall_filter(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """BPF instructions (code, jump if true, jump if false, operand). OSError for a machine it isn't written for."""
    if machine not in _MACHINES:
        raise OSError(f"there is no system call filter for {machine}; code can be run on {' and '.join(_MACHINES)}")
    at = _MACHINES[machine]
    refuse = (_RETURN, 0, 0, _ERRNO | _EPERM)
    filter = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCH[at]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NR),
        (_AT_LEAST, 0, 1, _X32),
        refuse,
    ]
    for numbers in _REFUSED.values():
        filter += [(_EQUAL, 0, 1, numbers[at]), refuse] if numbers[at] else []
    # The C library falls back to clone, whose flags can be seen here; clone3 keeps them in memory.
    filter += [(_EQUAL, 0, 1, _CLONE3[at]), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    filter += _only_with(_CLONE[at], (_ANY_BIT, _CLONE_THREAD))
    filter += _only_with(_TGKILL[at], (_EQUAL, pid))
    filter += _only_with(_PRLIMIT[at], (_EQUAL, 0))
    return [*filter, (_RETURN, 0, 0, _ALLOW)]


def _only_with(number: int, first: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """System call `number` only where the low half of its first argument passes the test."""
    test, operand = first
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _EPERM)
    return [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, _FIRST_ARGUMENT), (test, 0, 1, operand), allow, refuse]


def install(filter: Sequence[tuple[int, int, int, int]]) -> None:
    """Put the filter in force for this process, for good."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in filter))
    program = ctypes.create_string_buffer(struct.pack("HL", len(filter), ctypes.addressof(code)))
    _check(_LIBC.prctl(_PR_SET_SECCOMP, 2, program, 0, 0), "prctl(SECCOMP)")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
