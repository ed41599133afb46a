"""Which layer of the kernel a function belongs to: by the file that defines it."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping, Sequence

from grader.probe.sources import Site

OTHER = "other"
CALLER = ""
"""The layer of helpers that anybody calls: they are charged to the nearest caller that has one."""

# Layer -> patterns of "file" or "file:function"; `*` also matches slashes. A function belongs to
# the layer of the first pattern that fits, from top to bottom. Layers are printed in this order.
RULES: Sequence[tuple[str, str]] = (
    ("user", ":user"),
    # Entry and exit. What entry code is not a system call's is an interrupt's.
    ("system calls", "arch/x86/entry/entry_64.S:entry_SYSCALL_64*"),
    ("system calls", "arch/x86/entry/common.c:do_syscall_64"),
    ("system calls", "arch/x86/entry/syscall_64.c"),
    ("system calls", "kernel/entry/common.c:syscall_*"),
    ("system calls", "kernel/entry/common.c:__syscall_*"),
    ("system calls", "kernel/entry/common.c:*exit_to_user_mode*"),
    ("system calls", "arch/x86/kernel/fpu/core.c:fpregs_assert_state_consistent"),
    ("system calls", "*:arch_exit_to_user_mode_prepare"),
    ("scheduler", "arch/x86/entry/entry*:__switch_to_asm"),
    ("scheduler", "arch/x86/entry/entry*:ret_from_fork*"),
    ("interrupts", "arch/x86/entry/*"),
    ("interrupts", "kernel/entry/*"),
    ("MegaPipe", "megapipe/"),
    ("limit", "mp_limit/"),
    ("epoll", "fs/eventpoll.c"),
    ("io_uring", "io_uring/*"),
    ("files", "fs/*"),
    ("files", "drivers/tty/*"),
    # struct socket and what all protocols share; a protocol's own calls are in af_inet.c.
    ("sockets", "net/socket.c"),
    ("sockets", "net/core/sock.c"),
    ("sockets", "net/core/stream.c"),
    ("sockets", "net/core/datagram.c"),
    ("sockets", "net/core/scm.c"),
    ("sockets", "net/core/net_namespace.c"),
    ("sockets", "net/ipv4/af_inet.c"),
    ("sockets", "net/unix/*"),
    ("TCP", "net/ipv4/tcp*"),
    ("TCP", "net/ipv4/inet_connection_sock.c"),
    ("TCP", "net/ipv4/inet_hashtables.c"),
    ("TCP", "net/ipv4/inet_timewait_sock.c"),
    ("TCP", "net/ipv4/syncookies.c"),
    ("TCP", "net/core/request_sock.c"),
    ("TCP", "net/core/secure_seq.c"),
    ("TCP", "net/core/sock_reuseport.c"),
    # Packet buffers have a layer of their own: TCP, GRO and the driver all make and free them.
    ("packet buffers", "net/core/skbuff.c"),
    ("packet buffers", "net/core/page_pool.c"),
    ("driver", "drivers/net/*"),
    ("driver", "drivers/virtio/*"),
    ("driver", "net/core/dev*.c"),
    ("driver", "net/core/gro*.c"),
    ("driver", "net/core/flow_dissector.c"),
    ("driver", "net/core/netdev*.c"),
    ("driver", "net/sched/*"),
    ("driver", "net/ethernet/*"),
    ("driver", "arch/x86/kernel/pci-*"),
    ("driver", "kernel/dma/*"),
    # Routing, neighbours and netfilter.
    ("IP", "net/ipv4/*"),
    ("IP", "net/netfilter/*"),
    ("IP", "net/core/*"),
    ("IP", "net/ipv6/*"),
    ("IP", "net/*"),
    ("timers", "kernel/time/*"),
    ("timers", "arch/x86/kernel/tsc*.c"),
    ("timers", "arch/x86/kernel/pvclock.c"),
    ("timers", "arch/x86/kernel/kvmclock.c"),
    ("timers", "drivers/clocksource/*"),
    ("timers", "arch/x86/kernel/apic/apic.c:lapic_*"),
    ("interrupts", "kernel/softirq.c"),
    ("interrupts", "kernel/irq/*"),
    ("interrupts", "kernel/irq_work.c"),
    ("interrupts", "arch/x86/kernel/irq*.c"),
    ("interrupts", "arch/x86/kernel/apic/*"),
    ("interrupts", "arch/x86/kernel/smp.c"),
    ("interrupts", "kernel/smp.c"),
    ("interrupts", "kernel/context_tracking.c"),
    ("interrupts", "arch/x86/kernel/traps.c"),
    ("scheduler", "kernel/sched/*"),
    ("scheduler", "kernel/workqueue.c"),
    ("scheduler", "kernel/kthread.c"),
    ("scheduler", "kernel/smpboot.c"),
    ("scheduler", "kernel/futex/*"),
    ("scheduler", "kernel/stop_machine.c"),
    ("scheduler", "drivers/cpuidle/*"),
    ("scheduler", "arch/x86/kernel/process*.c"),
    ("scheduler", "arch/x86/kernel/fpu/*"),
    ("scheduler", "arch/x86/mm/tlb.c"),
    ("scheduler", "arch/x86/kernel/head_64.S"),
    ("scheduler", "arch/x86/kernel/smpboot.c"),
    ("scheduler", "init/main.c"),
    ("security", "security/*"),
    ("security", "kernel/audit*.c"),
    ("security", "kernel/seccomp.c"),
    ("security", "kernel/cred.c"),
    ("security", "kernel/capability.c"),
    ("security", "mm/usercopy.c"),
    ("RCU", "kernel/rcu/*"),
    ("allocator", "mm/slub.c"),
    ("allocator", "mm/slab_common.c"),
    ("allocator", "mm/page_alloc.c"),
    ("allocator", "mm/memcontrol*.c"),
    ("allocator", "mm/page_counter.c"),
    ("allocator", "mm/mempool.c"),
    ("allocator", "mm/percpu*.c"),
    ("allocator", "mm/vmstat.c"),
    ("allocator", "mm/page_frag_cache.c"),
    ("allocator", "mm/mempolicy.c"),
    ("allocator", "mm/mmzone.c"),
    ("allocator", "mm/page_isolation.c"),
    ("allocator", "mm/swap.c"),
    ("allocator", "mm/list_lru.c"),
    ("allocator", "mm/util.c"),
    # Mappings and page faults.
    ("memory", "mm/*"),
    ("memory", "arch/x86/mm/*"),
    (CALLER, "lib/*"),
    (CALLER, "arch/x86/lib/*"),
    (CALLER, "kernel/locking/*"),
    (CALLER, "arch/x86/kernel/paravirt*"),
    (CALLER, "arch/x86/kernel/alternative.c"),
    (CALLER, "arch/x86/kernel/static_call.c"),
    (CALLER, "drivers/char/random.c"),
    (CALLER, "crypto/*"),
    (OTHER, "*"),
)

CLOCK = "clock"
"""The clock's interrupt, whoever's functions it calls: it goes with real time, as nothing else.

What the softirqs do that run at the end of it is not part of it; as in `probe.c`.
"""
CLOCK_BEGIN, CLOCK_END = "sysvec_apic_timer_interrupt", "irq_exit_rcu"

LAYERS: Sequence[str] = (
    *dict.fromkeys(layer for layer, _ in RULES if layer not in (CALLER, OTHER)),
    CLOCK,
    OTHER,
)
TITLES: Mapping[str, str] = {
    "user": "user code",
    "system calls": "system-call entry and exit",
    "interrupts": "softirq and interrupts",
    "limit": "limit (mp_limit)",
    "files": "descriptors and VFS",
    "packet buffers": "packet buffers (skb)",
    "driver": "driver, device queue, GRO",
    "IP": "IP, routing, netfilter",
    "timers": "timers",
    "clock": "the clock's interrupt",
    "scheduler": "scheduler and wake-ups",
    "security": "security, audit, seccomp",
    "memory": "mappings and page faults",
}


@functools.cache
def layer_of(site: Site) -> str:
    """Return the layer of a function, `CALLER` if it is its caller's."""
    full = f"{site.file}:{site.name}"
    for layer, pattern in RULES:
        if fnmatch.fnmatchcase(full if ":" in pattern else site.file, pattern):
            return layer
    return OTHER


def charged(path: Sequence[Site]) -> str:
    """Return the layer that pays for what the last function of a call path does itself."""
    for site in reversed(path):
        if site.name == CLOCK_END:
            break
        if site.name == CLOCK_BEGIN:
            return CLOCK
    for site in reversed(path):
        if layer := layer_of(site):
            return layer
    return OTHER


def title(layer: str) -> str:
    """Return a layer's name for people."""
    return TITLES.get(layer, layer)
