// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The probe: a QEMU TCG plugin that counts, per vCPU and outside the guest's reach,
 *
 *   - the instructions executed in user mode and in the kernel, by the half of the address space
 *     that a translation block lies in. Firmware and the kernel's first steps run at low
 *     addresses and count as user: only differences taken after boot mean anything;
 *   - the executions of chosen instructions, the entries of kernel functions;
 *   - of the kernel's instructions, those between an entry of the counter "clock_ticks" and the
 *     next one of "interrupts_over": the clock's interrupt, without what softirqs do after it.
 *     Ticks come with real time, so under emulation there are tens of times as many of them for
 *     the same work.
 *
 * The counters lie in a file that the reader made and both map, so they can be read while the
 * guest runs. Arguments:
 *
 *   counters=PATH    the shared file; its header (struct probe_header) is already filled in
 *   functions=PATH   a text file of lines "hex-address name"; a name's first line gives it the
 *                    next counter, further lines with that name count into the same one
 *   instructions=off count functions only: next to nothing is added to the guest's time
 *   mark=ADDRESS     optional, in hex: whenever a vCPU is about to execute this instruction it
 *                    waits until the reader has passed the mark. With vCPUs that take turns on
 *                    one thread the whole guest stands still meanwhile, and in virtual time it
 *                    does not notice
 *
 * What counts as an instruction is QEMU's business. A block is counted whole when it is entered:
 * one that faults half-way is counted again from the faulting instruction on. QEMU 7.2 re-enters
 * the block for every iteration of a REP instruction and so counts each iteration; later ones
 * loop inside the block. With ERMS or FSRM in the CPU model the kernel itself chooses REP for
 * copying and clearing, so a fixed CPU model without both is part of a measurement, and numbers
 * from different versions of QEMU are not comparable.
 *
 * A function entry is counted at its first instruction. A function that is inlined is not there
 * to be counted, and one whose loop jumps back to its very first instruction would be counted
 * once per round (kernel functions begin with a landing pad or a tracing site, so none does).
 *
 * A vCPU writes its own block of counters only, so nothing on the way of the guest locks or
 * allocates, be vCPUs threads of their own (thread=multi) or turns of one (thread=single).
 */
#define PLUGIN_NAME "probe"
#include "plugin.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef PROBE_API_VERSION
#error "compile with -DPROBE_API_VERSION=<the plugin interface version of the QEMU at hand>"
#endif

#define PROBE_MAGIC	"MPPROBE\n"
#define PROBE_LAYOUT	3
#define MAX_VCPUS	64
#define MAX_FUNCTIONS	512
#define MAX_ADDRESSES	4096
#define MAX_NAME	128
/* Two cache lines: processors fetch lines in pairs, and a pair must not have two writers. */
#define BLOCK_ALIGN	128

enum probe_state {
	STATE_NEW,	/* made by the reader, no plugin yet */
	STATE_COUNTING,	/* a QEMU has loaded the plugin */
	STATE_ENDED,	/* that QEMU has exited in an orderly way */
};

struct probe_header {
	char magic[8];
	uint32_t layout;
	uint32_t vcpus;
	uint32_t functions;
	uint32_t block_bytes;
	uint64_t blocks_offset;
	uint32_t state;		/* written by the plugin, as is what follows */
	uint32_t api_version;	/* the newest that this QEMU speaks */
	uint32_t guest_vcpus;
	uint32_t addresses;
	uint32_t marks;		/* reached so far */
	uint32_t passed;	/* of these; written by the reader */
};

struct probe_block {
	uint64_t user;
	uint64_t kernel;
	uint64_t clock;		/* of those of the kernel */
	uint64_t in_clock;	/* 0 or all ones: the vCPU is in the clock's interrupt */
	uint64_t calls[];
};

struct address {
	uint64_t vaddr;
	unsigned int function;
};

QEMU_PLUGIN_EXPORT int qemu_plugin_version = PROBE_API_VERSION;

static struct probe_header *header;
static bool count_instructions = true;
static struct probe_block *blocks[MAX_VCPUS];

/* Sorted by address; not written after installation, so translating threads share it freely. */
static struct address addresses[MAX_ADDRESSES];
static size_t n_addresses;

/* Where a vCPU waits for the reader; 0: nowhere. */
static uint64_t mark_address;

static char names[MAX_FUNCTIONS][MAX_NAME];
static unsigned int n_names;

static void count_user(unsigned int vcpu, void *insns)
{
	blocks[vcpu]->user += (uintptr_t)insns;
}

static void count_kernel(unsigned int vcpu, void *insns)
{
	struct probe_block *block = blocks[vcpu];

	block->kernel += (uintptr_t)insns;
	block->clock += (uintptr_t)insns & block->in_clock;
}

static void count_call(unsigned int vcpu, void *function)
{
	blocks[vcpu]->calls[(uintptr_t)function]++;
}

static void begin_clock(unsigned int vcpu, void *function)
{
	count_call(vcpu, function);
	blocks[vcpu]->in_clock = UINT64_MAX;
}

static void end_clock(unsigned int vcpu, void *function)
{
	count_call(vcpu, function);
	blocks[vcpu]->in_clock = 0;
}

static void reach_mark(unsigned int vcpu, void *unused)
{
	const struct timespec moment = { .tv_nsec = 1000000 };
	uint32_t mark = __atomic_add_fetch(&header->marks, 1, __ATOMIC_RELEASE);

	(void)vcpu;
	(void)unused;
	/* Acquire: what is counted from here on is counted after the reader has read. */
	while (__atomic_load_n(&header->passed, __ATOMIC_ACQUIRE) < mark)
		nanosleep(&moment, NULL);
}

/* What to call when this function is entered. */
static qemu_plugin_vcpu_udata_cb_t counting(unsigned int function)
{
	if (!strcmp(names[function], "clock_ticks"))
		return begin_clock;
	if (!strcmp(names[function], "interrupts_over"))
		return end_clock;
	return count_call;
}

static bool in_kernel(uint64_t vaddr)
{
	return vaddr >> 63;
}

/* The index of the first chosen address that is not below vaddr. */
static size_t first_address(uint64_t vaddr)
{
	size_t low = 0, high = n_addresses;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (addresses[middle].vaddr < vaddr)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t i, next, n = qemu_plugin_tb_n_insns(tb);
	uint64_t start;

	(void)id;
	if (!n)
		return;
	start = qemu_plugin_insn_vaddr(qemu_plugin_tb_get_insn(tb, 0));
	if (count_instructions)
		qemu_plugin_register_vcpu_tb_exec_cb(tb,
						     in_kernel(start) ? count_kernel : count_user,
						     QEMU_PLUGIN_CB_NO_REGS, (void *)(uintptr_t)n);

	next = first_address(start);
	for (i = next; i-- > 0 && start - addresses[i].vaddr <= PROLOGUE_BYTES;)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, counting(addresses[i].function),
						     QEMU_PLUGIN_CB_NO_REGS,
						     (void *)(uintptr_t)addresses[i].function);

	/* The instructions of a block follow one another in memory. */
	for (i = 0; i < n && (mark_address || next < n_addresses); i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		uint64_t vaddr = qemu_plugin_insn_vaddr(insn);

		if (mark_address && vaddr == mark_address)
			qemu_plugin_register_vcpu_insn_exec_cb(insn, reach_mark,
							       QEMU_PLUGIN_CB_NO_REGS, NULL);
		while (next < n_addresses && addresses[next].vaddr < vaddr)
			next++;
		for (; next < n_addresses && addresses[next].vaddr == vaddr; next++)
			qemu_plugin_register_vcpu_insn_exec_cb(
				insn, counting(addresses[next].function), QEMU_PLUGIN_CB_NO_REGS,
				(void *)(uintptr_t)addresses[next].function);
	}
}

static void ended(qemu_plugin_id_t id, void *unused)
{
	(void)id;
	(void)unused;
	__atomic_store_n(&header->state, STATE_ENDED, __ATOMIC_RELEASE);
}

static int function_of(const char *name)
{
	unsigned int i;

	for (i = 0; i < n_names; i++)
		if (!strcmp(names[i], name))
			return (int)i;
	if (n_names == MAX_FUNCTIONS)
		return -1;
	strcpy(names[n_names], name);
	return (int)n_names++;
}

static int by_vaddr(const void *left, const void *right)
{
	const struct address *a = left, *b = right;

	if (a->vaddr != b->vaddr)
		return a->vaddr < b->vaddr ? -1 : 1;
	return a->function < b->function ? -1 : a->function > b->function;
}

static int read_functions(const char *path)
{
	FILE *file = fopen(path, "r");
	char line[MAX_NAME + 64], name[MAX_NAME];
	unsigned int number = 0;
	size_t i;

	if (!file)
		return refuse("%s: %s", path, strerror(errno));
	while (fgets(line, sizeof(line), file)) {
		uint64_t vaddr;
		int function, used = 0;

		number++;
		/* The width of %s is MAX_NAME - 1. */
		if (sscanf(line, "%" SCNx64 " %127s %n", &vaddr, name, &used) != 2 || line[used]) {
			fclose(file);
			return refuse("%s:%u: not \"hex-address name\"", path, number);
		}
		function = function_of(name);
		if (function < 0 || n_addresses == MAX_ADDRESSES) {
			fclose(file);
			return refuse("%s: more than %d functions or %d addresses", path,
				      MAX_FUNCTIONS, MAX_ADDRESSES);
		}
		addresses[n_addresses].vaddr = vaddr;
		addresses[n_addresses].function = (unsigned int)function;
		n_addresses++;
	}
	fclose(file);

	qsort(addresses, n_addresses, sizeof(addresses[0]), by_vaddr);
	for (i = 1; i < n_addresses; i++)
		if (!by_vaddr(&addresses[i - 1], &addresses[i]))
			return refuse("%s: %s has the address %" PRIx64 " twice", path,
				      names[addresses[i].function], addresses[i].vaddr);
	return 0;
}

static int check_header(const char *path, uint64_t bytes)
{
	uint64_t needed = sizeof(struct probe_block) + header->functions * sizeof(uint64_t);

	if (memcmp(header->magic, PROBE_MAGIC, sizeof(header->magic)) ||
	    header->layout != PROBE_LAYOUT)
		return refuse("%s: not a counter file of layout %d", path, PROBE_LAYOUT);
	if (header->state != STATE_NEW)
		return refuse("%s: already used by another QEMU", path);
	if (!header->vcpus || header->vcpus > MAX_VCPUS || header->functions > MAX_FUNCTIONS ||
	    header->block_bytes < needed || header->block_bytes % BLOCK_ALIGN ||
	    header->blocks_offset < sizeof(*header) || header->blocks_offset % BLOCK_ALIGN ||
	    header->blocks_offset > bytes ||
	    (uint64_t)header->vcpus * header->block_bytes > bytes - header->blocks_offset)
		return refuse("%s: the header does not fit the file", path);
	return 0;
}

static int map_counters(const char *path)
{
	uint64_t bytes;
	unsigned int i;
	void *map;

	map = map_file(path, sizeof(*header), &bytes);
	if (!map)
		return -1;
	header = map;
	if (check_header(path, bytes))
		return -1;
	for (i = 0; i < header->vcpus; i++)
		blocks[i] = (void *)((char *)map + header->blocks_offset +
				     (size_t)i * header->block_bytes);
	return 0;
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	const char *counters = NULL, *functions = NULL, *mark = NULL;
	char *end;
	int i;

	for (i = 0; i < argc; i++) {
		if (value_of(argv[i], "counters"))
			counters = value_of(argv[i], "counters");
		else if (value_of(argv[i], "functions"))
			functions = value_of(argv[i], "functions");
		else if (value_of(argv[i], "mark"))
			mark = value_of(argv[i], "mark");
		else if (!strcmp(argv[i], "instructions=off"))
			count_instructions = false;
		else
			return refuse("unknown argument %s", argv[i]);
	}
	if (!counters || !functions)
		return refuse("arguments: counters=PATH,functions=PATH[,instructions=off][,mark=ADDRESS]");
	if (!info->system_emulation || strcmp(info->target_name, "x86_64"))
		return refuse("only for qemu-system-x86_64, this is a QEMU for %s",
			      info->target_name);
	if (map_counters(counters) || read_functions(functions))
		return -1;
	if (mark) {
		mark_address = strtoull(mark, &end, 16);
		if (*end || !in_kernel(mark_address))
			return refuse("mark=%s: not a hex address of the kernel's half", mark);
	}
	if (n_names != header->functions)
		return refuse("%s names %u functions, %s has room for %u", functions, n_names,
			      counters, header->functions);
	/* Checked here, once, so that no callback has to. */
	if (info->system.max_vcpus < 0 || (uint32_t)info->system.max_vcpus > header->vcpus)
		return refuse("the guest has %d vCPUs (maxcpus), %s has room for %u",
			      info->system.max_vcpus, counters, header->vcpus);

	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, ended, NULL);
	header->api_version = (uint32_t)info->version.cur;
	header->guest_vcpus = (uint32_t)info->system.smp_vcpus;
	header->addresses = (uint32_t)n_addresses;
	__atomic_store_n(&header->state, STATE_COUNTING, __ATOMIC_RELEASE);
	return 0;
}
