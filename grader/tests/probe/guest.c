// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The init of a guest that does a known amount of work: for each line with the number of a
 * processor, it moves there, makes CALLS system calls and counts down from LOOPS. Written out in
 * instructions, so that their number does not depend on the compiler. With the argument "once" it
 * works once, unasked, on processor 0, and ends the guest; with "exit" it ends, which the kernel
 * answers with a panic.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	/* The kernel passes on what it does not know, too (nokaslr), and first. */
	int once = !strcmp(argv[argc - 1], "once");
	char line[16] = "0";
	cpu_set_t set;
	long calls, loops;

	if (!strcmp(argv[argc - 1], "exit"))
		return 0;
	for (;;) {
		if (!once) {
			write(1, "ready\n", 6);
			if (read(0, line, sizeof(line)) < 1)
				continue;
		}
		CPU_ZERO(&set);
		CPU_SET(line[0] - '0', &set);
		sched_setaffinity(0, sizeof(set), &set);
		calls = CALLS;
		asm volatile("1: mov %1, %%eax; syscall; dec %0; jnz 1b"
			     : "+r"(calls)
			     : "i"(SYS_getppid)
			     : "rax", "rcx", "r11", "memory", "cc");
		loops = LOOPS;
		asm volatile("1: dec %0; jnz 1b" : "+r"(loops) : : "cc");
		if (once)
			reboot(RB_AUTOBOOT);
	}
}
