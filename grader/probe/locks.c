// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The lock probe: a QEMU TCG plugin that counts, for each lock of the guest's kernel, how often it
 * is taken, for how many instructions of its holder it is then held, and how often its holder is
 * another vCPU than the last one.
 *
 * A lock is a word in memory. It is taken by a locked instruction, or an immediate store, of a
 * function that takes locks, and given back by one of a function that gives them back; the reader
 * says which functions those are. Seen are spin locks, the writers of rwlocks, mutexes (as far as
 * nobody sleeps for them) and sockets owned by a task (lock_sock()). Not seen: readers, who do not
 * exclude one another, and locks that are built otherwise (RCU, seqlocks, semaphores, bit locks).
 *
 * A try that fails is a locked instruction, too. As vCPUs take turns on one thread (thread=single,
 * on which this relies: nothing here is atomic), a lock that is held by another vCPU has not been
 * taken; whoever waits takes it in the slow path, once it is free. If it was given back unseen, its
 * holder executes on and on meanwhile, and is not believed after STALE instructions.
 *
 * What is counted: locks that one of the first `recorded` vCPUs takes, while the reader has set
 * "recording". Held are the holder's instructions, those of interrupts between included, to a
 * translation block. Arguments:
 *
 *   counters=PATH    the shared file; its header (struct locks_header) is already filled in
 *   functions=PATH   a text file of lines "hex-begin hex-end kind", ascending; kind is an
 *                    enum kind, as a number
 *   recorded=N       optional: count the locks of the first N vCPUs only
 */
#define PLUGIN_NAME "lock probe"
#include "plugin.h"

#include <inttypes.h>
#include <stdlib.h>

#ifndef PROBE_API_VERSION
#error "compile with -DPROBE_API_VERSION=<the plugin interface version of the QEMU at hand>"
#endif

#define LOCKS_MAGIC	"MPLOCKS\n"
#define LOCKS_LAYOUT	1
#define MAX_VCPUS	64
#define MAX_FUNCTIONS	256
#define MAX_PROBES	256
#define STALE		(1u << 20)

enum { STATE_NEW, STATE_COUNTING, STATE_ENDED };

enum kind {
	KIND_TAKES,	/* by a locked instruction */
	KIND_WAITS,	/* the slow path: whoever stores here when the lock is free has it */
	KIND_GIVES,	/* by an immediate store or a locked instruction */
	KIND_OWNS,	/* takes by an immediate store */
};

struct locks_header {
	char magic[8];
	uint32_t layout;
	uint32_t slots;		/* of the table, a power of two */
	uint64_t slots_offset;
	uint32_t recording;	/* written by the reader at any time */
	uint32_t state;		/* written by the plugin, as is what follows */
	uint32_t api_version;
	uint32_t guest_vcpus;
	uint64_t overflow;	/* takings for which the table had no slot */
};

struct locks_slot {
	uint64_t vaddr;		/* of the lock; 0: free */
	uint64_t visits;
	uint64_t held;		/* instructions */
	uint64_t handovers;
	uint64_t since;		/* the holder's instructions then */
	uint32_t holder;	/* vCPU + 1, or 0 */
	uint32_t last;		/* likewise, of those that are recorded */
};

struct function {
	uint64_t begin, end;
	enum kind kind;
};

QEMU_PLUGIN_EXPORT int qemu_plugin_version = PROBE_API_VERSION;

static struct locks_header *header;
static struct locks_slot *slots;
static uint64_t slots_mask;
static struct function functions[MAX_FUNCTIONS];
static size_t n_functions;
static unsigned int n_recorded = MAX_VCPUS;
static uint64_t executed[MAX_VCPUS];

static void execute(unsigned int vcpu, void *insns)
{
	executed[vcpu] += (uintptr_t)insns;
}

/* The slot of this word; if there is none, NULL or, with @make, a new one. */
static struct locks_slot *slot_of(uint64_t vaddr, bool make)
{
	/* The golden ratio's fraction; the high bits are the well-mixed ones. */
	uint64_t at = (vaddr * 0x9e3779b97f4a7c15u) >> 20;
	int i;

	for (i = 0; i < MAX_PROBES; i++, at++) {
		struct locks_slot *slot = &slots[at & slots_mask];

		if (!slot->vaddr && !make)
			return NULL;
		if (!slot->vaddr)
			slot->vaddr = vaddr;
		if (slot->vaddr == vaddr)
			return slot;
	}
	header->overflow += make;
	return NULL;
}

static void take(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *unused)
{
	struct locks_slot *slot = slot_of(vaddr, true);
	uint32_t me = vcpu + 1;

	(void)info;
	(void)unused;
	if (!slot)
		return;
	if (slot->holder && slot->holder != me &&
	    executed[slot->holder - 1] - slot->since < STALE)
		return;
	slot->holder = me;
	slot->since = executed[vcpu];
}

/* The slow path writes to other words, too; the lock is the one that somebody has held. */
static void take_after_waiting(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr,
			       void *unused)
{
	struct locks_slot *slot = slot_of(vaddr, false);

	if (slot && !slot->holder)
		take(vcpu, info, vaddr, unused);
}

static void give(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *unused)
{
	struct locks_slot *slot = slot_of(vaddr, false);
	uint32_t me = vcpu + 1;

	(void)info;
	(void)unused;
	if (!slot || slot->holder != me)
		return;
	slot->holder = 0;
	if (vcpu >= n_recorded)
		return;
	if (__atomic_load_n(&header->recording, __ATOMIC_RELAXED)) {
		slot->visits++;
		slot->held += executed[vcpu] - slot->since;
		slot->handovers += slot->last && slot->last != me;
	}
	slot->last = me;
}

static const struct function *function_of(uint64_t vaddr)
{
	size_t low = 0, high = n_functions;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (functions[middle].end <= vaddr)
			low = middle + 1;
		else
			high = middle;
	}
	return low < n_functions && functions[low].begin <= vaddr ? &functions[low] : NULL;
}

/* What this instruction of a function of that kind does to a lock, or NULL. */
static qemu_plugin_vcpu_mem_cb_t doing(enum kind kind, const struct qemu_plugin_insn *insn)
{
	unsigned char copy[INSN_BYTES];
	size_t size;
	const unsigned char *bytes = insn_bytes(insn, header->api_version, copy, &size);
	size_t first = size > 1 && (bytes[0] & 0xf0) == 0x40;	/* behind a REX prefix */
	bool locked = bytes[0] == 0xf0;
	bool immediate = bytes[first] == 0xc6 || bytes[first] == 0xc7;

	switch (kind) {
	case KIND_TAKES:
		return locked ? take : NULL;
	case KIND_WAITS:
		return take_after_waiting;
	case KIND_GIVES:
		return locked || immediate ? give : NULL;
	case KIND_OWNS:
		return immediate ? take : NULL;
	}
	return NULL;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t i, n = qemu_plugin_tb_n_insns(tb);

	(void)id;
	qemu_plugin_register_vcpu_tb_exec_cb(tb, execute, QEMU_PLUGIN_CB_NO_REGS,
					     (void *)(uintptr_t)n);
	for (i = 0; i < n; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		const struct function *function = function_of(qemu_plugin_insn_vaddr(insn));
		qemu_plugin_vcpu_mem_cb_t what = function ? doing(function->kind, insn) : NULL;

		if (what)
			qemu_plugin_register_vcpu_mem_cb(insn, what, QEMU_PLUGIN_CB_NO_REGS,
							 QEMU_PLUGIN_MEM_W, NULL);
	}
}

static void ended(qemu_plugin_id_t id, void *unused)
{
	(void)id;
	(void)unused;
	__atomic_store_n(&header->state, STATE_ENDED, __ATOMIC_RELEASE);
}

static int map_counters(const char *path)
{
	uint64_t bytes;
	char *map = map_file(path, sizeof(*header), &bytes);

	if (!map)
		return -1;
	header = (void *)map;
	if (memcmp(header->magic, LOCKS_MAGIC, sizeof(header->magic)) ||
	    header->layout != LOCKS_LAYOUT)
		return refuse("%s: not a lock file of layout %d", path, LOCKS_LAYOUT);
	if (header->state != STATE_NEW)
		return refuse("%s: already used by another QEMU", path);
	if (!header->slots || header->slots & (header->slots - 1) ||
	    header->slots_offset < sizeof(*header) || header->slots_offset % 64 ||
	    header->slots_offset > bytes ||
	    header->slots * sizeof(*slots) > bytes - header->slots_offset)
		return refuse("%s: the header does not fit the file", path);
	slots = (void *)(map + header->slots_offset);
	slots_mask = header->slots - 1;
	return 0;
}

static int read_functions(const char *path)
{
	FILE *file = fopen(path, "r");
	char line[128];

	if (!file)
		return refuse("%s: %s", path, strerror(errno));
	while (fgets(line, sizeof(line), file)) {
		struct function *one = &functions[n_functions];
		unsigned int kind;
		int used = 0;

		if (n_functions == MAX_FUNCTIONS ||
		    sscanf(line, "%" SCNx64 " %" SCNx64 " %u %n", &one->begin, &one->end, &kind,
			   &used) != 3 || line[used] || kind > KIND_OWNS ||
		    one->end <= one->begin || (n_functions && one->begin < one[-1].end)) {
			fclose(file);
			return refuse("%s:%zu: not \"hex-begin hex-end kind\" above the last, or "
				      "more than %d", path, n_functions + 1, MAX_FUNCTIONS);
		}
		one->kind = (enum kind)kind;
		n_functions++;
	}
	fclose(file);
	return 0;
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	const char *counters = NULL, *list = NULL, *recorded = NULL;
	char *end;
	int i;

	for (i = 0; i < argc; i++) {
		if (value_of(argv[i], "counters"))
			counters = value_of(argv[i], "counters");
		else if (value_of(argv[i], "functions"))
			list = value_of(argv[i], "functions");
		else if (value_of(argv[i], "recorded"))
			recorded = value_of(argv[i], "recorded");
		else
			return refuse("unknown argument %s", argv[i]);
	}
	if (!counters || !list)
		return refuse("arguments: counters=PATH,functions=PATH[,recorded=N]");
	if (!info->system_emulation || strcmp(info->target_name, "x86_64"))
		return refuse("only for qemu-system-x86_64, this is a QEMU for %s",
			      info->target_name);
	if (map_counters(counters) || read_functions(list))
		return -1;
	/* Checked here, once, so that no callback has to. */
	if (info->system.max_vcpus < 0 || info->system.max_vcpus > MAX_VCPUS)
		return refuse("the guest has %d vCPUs (maxcpus), there is room for %d",
			      info->system.max_vcpus, MAX_VCPUS);
	if (recorded) {
		n_recorded = (unsigned int)strtoul(recorded, &end, 10);
		if (*end || !n_recorded)
			return refuse("recorded=%s: not a number of vCPUs", recorded);
	}
	header->api_version = (uint32_t)info->version.cur;
	header->guest_vcpus = (uint32_t)info->system.smp_vcpus;
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, ended, NULL);
	__atomic_store_n(&header->state, STATE_COUNTING, __ATOMIC_RELEASE);
	return 0;
}
