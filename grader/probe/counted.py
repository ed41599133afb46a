"""Which kernel functions stand for which event: the standard set, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from grader.probe.symbols import Symbols


@dataclass(frozen=True)
class Counted:
    """One counter: entries of `symbols` (names or patterns) together, under `name`.

    With `optional`, symbols that the kernel at hand lacks are left out, and with none left there
    is no such counter (absent is not zero). Without, each must exist.
    """

    name: str
    symbols: tuple[str, ...]
    meaning: str
    optional: bool = False


def _counted(name: str, symbols: str, meaning: str, *, optional: bool = False) -> Counted:
    return Counted(name, tuple(symbols.split()), meaning, optional)


EVENTS = (
    # Entered from the SYSCALL instruction's entry code exactly once each, whatever the number;
    # x64_sys_call is not reached when seccomp or ptrace turns the call down.
    _counted("syscalls", "do_syscall_64", "system calls, all"),
    _counted(
        "epoll_wait",
        "__x64_sys_epoll_wait __x64_sys_epoll_pwait __x64_sys_epoll_pwait2",
        "epoll_wait and its variants",
    ),
    _counted("epoll_ctl", "__x64_sys_epoll_ctl", "epoll_ctl"),
    _counted("read", "__x64_sys_read __x64_sys_readv", "read, readv"),
    _counted("write", "__x64_sys_write __x64_sys_writev", "write, writev"),
    _counted("accept", "__x64_sys_accept __x64_sys_accept4", "accept, accept4"),
    _counted("ioctl", "__x64_sys_ioctl", "ioctl"),
    _counted("close", "__x64_sys_close", "close"),
    _counted("sendto", "__x64_sys_sendto __x64_sys_sendmsg", "send, sendto, sendmsg"),
    _counted("recvfrom", "__x64_sys_recvfrom __x64_sys_recvmsg", "recv, recvfrom, recvmsg"),
    _counted("io_uring_enter", "__x64_sys_io_uring_enter", "io_uring_enter", optional=True),
    _counted("file_alloc", "alloc_empty_file", "struct file allocations"),
    _counted("inode_alloc", "alloc_inode", "inode allocations, sockets' included"),
    _counted("sock_inode_alloc", "sock_alloc_inode", "inode allocations of sockets"),
    _counted("dentry_alloc", "__d_alloc", "dentry allocations"),
    _counted("fd_alloc", "alloc_fd", "descriptors allotted"),
    _counted("sock_alloc", "sk_prot_alloc", "struct sock allocations"),
    _counted(
        "tcp_accept",
        "inet_csk_accept inet_csk_accept_bare",
        "connections taken from a listener's queue",
    ),
    _counted("tcp_rcv", "tcp_v4_rcv", "TCP segments received"),
    # What tcp_sendmsg() is under the lock of the socket, which the limit and MegaPipe take by
    # themselves; and the two ways to read.
    _counted("tcp_sendmsg", "tcp_sendmsg_locked", "writes to a TCP connection"),
    _counted("tcp_recvmsg", "tcp_recvmsg tcp_read_sock", "reads from a TCP connection"),
    _counted("tcp_close", "tcp_close", "connections closed by their owner"),
    _counted("wakeups", "try_to_wake_up", "attempts to wake a task"),
    _counted("queue_wakeups", "__wake_up_sync_key", "wait queues woken by a socket's callback"),
    _counted("schedules", "__schedule", "runs of the scheduler"),
    _counted("context_switches", "__switch_to", "switches from one task to another"),
    _counted(
        "ipis",
        "sysvec_reschedule_ipi sysvec_call_function sysvec_call_function_single",
        "inter-processor interrupts received",
        optional=True,
    ),
    # These two bound what the probe counts as the clock's, see probe.c.
    _counted("clock_ticks", "sysvec_apic_timer_interrupt", "interrupts of the local clock"),
    _counted("interrupts_over", "irq_exit_rcu", "interrupts, all, at their end"),
    _counted("virtnet_poll", "virtnet_poll", "runs of the network card's poll"),
    _counted("start_xmit", "start_xmit", "packets handed to the virtio network card"),
    _counted("doorbells", "vp_notify vp_notify_with_data", "writes of a virtio doorbell"),
)
"""What the work of a server consists of."""

REPORTERS = (
    # kasan_report() is also entered, and does nothing, while kmemleak reads whatever there is.
    _counted("kasan", "print_report", "KASAN: bad memory access", optional=True),
    _counted("kfence", "kfence_report_error", "KFENCE: bad memory access", optional=True),
    _counted(
        "slub",
        "object_err slab_err slab_fix",
        "SLUB: corrupted or wrongly freed object",
        optional=True,
    ),
    _counted("ubsan", "__ubsan_handle_*", "UBSAN: undefined behaviour", optional=True),
    _counted(
        "lockdep",
        "print_circular_bug print_deadlock_bug print_bad_irq_dependency print_irq_inversion_bug "
        "print_usage_bug print_lock_invalid_wait_context print_unlock_imbalance_bug "
        "print_lock_nested_lock_not_held print_freed_lock_bug print_held_locks_bug "
        "print_lock_contention_bug lockdep_rcu_suspicious",
        "lockdep: a locking rule broken",
        optional=True,
    ),
    _counted("debug_locks_off", "debug_locks_off", "lock debugging gave up", optional=True),
    _counted("spin_bug", "spin_bug rwlock_bug", "a misused spinlock", optional=True),
    _counted("debug_objects", "debug_print_object", "misused timer, work or RCU", optional=True),
    _counted("schedule_bug", "__schedule_bug", "scheduling while atomic", optional=True),
    _counted(
        "stall",
        "print_cpu_stall_info",
        "RCU: a processor stalled",
        optional=True,
    ),
    _counted("warn", "__warn", "WARN"),
    _counted("bug", "report_bug", "BUG or WARN trapped"),
    _counted("taint", "add_taint", "kernel tainted (loading a foreign module does, too)"),
    _counted("dump_stack", "dump_stack_lvl", "stack printed, as most reports do"),
    _counted("oops", "oops_begin die", "oops"),
    _counted("panic", "panic", "panic"),
    _counted("stack_smashed", "__stack_chk_fail", "kernel stack overrun", optional=True),
    _counted("kmemleak", "print_unreferenced", "kmemleak: leak printed", optional=True),
)
"""What a kernel calls to report a bug: all zero in a sound run."""

STANDARD = EVENTS + REPORTERS


def select(counted: Iterable[Counted], symbols: Symbols) -> dict[str, tuple[str, ...]]:
    """Return counter name -> symbols for `counted` in the kernel at hand, optional ones if there.

    Raises `UnknownSymbol` if a symbol is absent that is not optional.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    for one in counted:
        if not one.optional:
            symbols.resolve(one.symbols)
        present = tuple(name for name in one.symbols if symbols.has(name))
        if present:
            chosen[one.name] = present
    return chosen
