// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The sharing probe: a QEMU TCG plugin that counts cache lines moving between vCPUs, as perf c2c
 * samples them on a real machine, and says which function moved which line.
 *
 * The model. Memory is lines of 64 bytes, by physical address. Every vCPU has a private cache
 * that never has to drop a line, and a store takes a line away from all others, as in MESI. With
 * such caches a set of holders is the whole state of a line:
 *
 *   - a load joins the holders. It is a transfer if the vCPU did not hold the line and another
 *     did: it never had it, or lost it to a store;
 *   - a store leaves its vCPU as the only holder. It is a transfer if another held the line,
 *     whether it then only loses its copy or has to hand it over;
 *   - the first touch of a line that nobody holds comes from memory, and is no transfer;
 *   - an instruction that loads and stores the same line (lock xadd, add to memory) asks for the
 *     line once, to write: its load and its store together are one transfer, of a store. QEMU
 *     reports the two as one access if vCPUs are threads of their own, else as two; "merged"
 *     counts the latter, so transfers + merged is what counting each access would give;
 *   - an access that straddles two lines can be two transfers. (One that also reads and writes
 *     both, a split lock, has only its second line's load and store merged.)
 *
 * Whether the other copy is modified makes no difference here; a line that is only ever read
 * moves once to each vCPU and then never again. What is not seen: fetches of instructions, the
 * page walks of the MMU, and what QEMU itself writes (DMA: packet data, the rings of virtio).
 * Not modelled: capacity, the sizes and sharing of real cache levels, prefetching, sockets. So a
 * count is of transfers that the program's own sharing causes, and a lower bound of the traffic.
 *
 * vCPUs that take turns on one thread (thread=single) run for long between two changes, and
 * each line then moves at most once a turn: counts depend on the length of turns, and a line over
 * which two processors really fight moves more often on a real machine.
 *
 * The state of the lines is always kept. Only while the reader has set "recording" in the header
 * are transfers counted, all of them: for each vCPU, by user or kernel code (the half of the
 * address space that the instruction lies in), and in a table under (code, line). The sum over
 * the table plus "overflow" is the sum over the vCPUs.
 *
 * Apart from these, and in no table, are those of the clock's interrupt, if the reader says where it
 * begins and ends: as with instructions (probe.c) it goes with real time, of which an emulated guest
 * needs the more for a transaction, and a guest with this plugin more still. What others then fetch
 * back that the interrupt has written is theirs.
 *
 * Code is a function: of the kernel by a list of addresses; of other code in the kernel's half
 * (modules) the 16 bytes that the instruction lies in, a "place", for functions begin at multiples
 * of 16 and the reader can name them later; all code of user space is one. Arguments:
 *
 *   counters=PATH    the shared file; its header (struct sharing_header) is already filled in
 *   functions=PATH   a text file of hex addresses, one a line, ascending: where functions begin
 *   memory_mib=N     the size of the guest's memory; what lies beyond is not seen
 *   direct=ADDRESS   optional: where the kernel has mapped all memory, one to one (in hex). Most
 *                    accesses go there, and QEMU need not be asked where they lead
 *   recorded=N       optional: count the transfers of the first N vCPUs only
 *   clock=ADDRESS, clock_end=ADDRESS   optional: functions (in hex) with whose entry a vCPU is in
 *                    the clock's interrupt, and no longer
 *   memory=PATH      optional: the file that is the guest's memory. It and the other two are
 *                    removed when the guest begins to run, for then all have opened them, and
 *                    whoever is killed from then on leaves no memory in use
 *
 * Concurrency. A line's holders change by one atomic exchange or OR, so of several vCPUs that are
 * threads (thread=multi) each sees a whole state and none is lost; the common case, nothing
 * changes, is a plain load. A vCPU writes only its own block of counters. A slot of the table is
 * taken by compare-and-swap and counts by atomic addition. The list of places has a lock, taken
 * only when code is translated. Nothing on the way of the guest allocates.
 */
#define PLUGIN_NAME "sharing probe"
#include "plugin.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef PROBE_API_VERSION
#error "compile with -DPROBE_API_VERSION=<the plugin interface version of the QEMU at hand>"
#endif

#define SHARING_MAGIC	"MPSHARE\n"
#define SHARING_LAYOUT	2
#define MAX_VCPUS	64
#define LINE_SHIFT	6
#define PAGE_SHIFT	12
/* Up to here QEMU's q35 maps memory one to one; above, it has a hole below 4 GiB. */
#define MAX_MEMORY_MIB	2816
/* A code's number, with the line's in one word. */
#define CODE_BITS	20
#define MAX_CODES	(1u << CODE_BITS)
#define MODULES		0xffffffffc0000000u	/* where modules begin, and the kernel's image ends */
#define PLACE_SHIFT	4
#define MAX_PROBES	256
/* Two cache lines: processors fetch lines in pairs, and a pair must not have two writers. */
#define BLOCK_ALIGN	128

enum sharing_state {
	STATE_NEW,	/* made by the reader, no plugin yet */
	STATE_LOADED,	/* a QEMU has loaded the plugin, and may still open files */
	STATE_RUNNING,	/* its guest executes */
	STATE_ENDED,	/* that QEMU has exited in an orderly way */
};

/* The numbers of codes; 0 is a free slot's. */
enum code {
	CODE_USER = 1,
	CODE_UNKNOWN,	/* the list of places is full */
	CODE_FUNCTIONS,	/* functions from here on, places after them */
};

struct sharing_header {
	char magic[8];
	uint32_t layout;
	uint32_t vcpus;
	uint32_t block_bytes;
	uint32_t functions;
	uint32_t places;	/* room for so many */
	uint32_t slots;		/* of the table, a power of two */
	uint64_t blocks_offset;
	uint64_t places_offset;
	uint64_t slots_offset;
	uint32_t recording;	/* written by the reader at any time */
	uint32_t state;		/* written by the plugin, as is what follows */
	uint32_t api_version;	/* the newest that this QEMU speaks */
	uint32_t guest_vcpus;
	uint32_t used_places;
	uint32_t memory_mib;
};

enum mode { USER, KERNEL, CLOCK, MODES };

struct sharing_block {
	uint64_t loads[MODES];
	uint64_t stores[MODES];
	uint64_t merged;	/* read-modify-writes: see above */
	uint64_t overflow;	/* transfers for which the table had no slot */
	uint64_t unseen;	/* accesses whose address QEMU did not tell; always counted */
};

struct sharing_slot {
	uint64_t key;		/* line << CODE_BITS | code; 0: free */
	uint64_t vaddr;		/* of the first access */
	uint64_t loads;
	uint64_t stores;
};

/* The load of a vCPU that may turn out to be half of a read-modify-write. */
struct pending {
	void *insn;
	uint64_t line;
	struct sharing_slot *slot;
	bool valid;
};

QEMU_PLUGIN_EXPORT int qemu_plugin_version = PROBE_API_VERSION;

static struct sharing_header *header;
static struct sharing_block *blocks[MAX_VCPUS];
static struct sharing_slot *slots;
static uint64_t slots_mask;
static uint64_t *places;
static struct {
	struct pending load;
	uint64_t in_clock;
	char apart[BLOCK_ALIGN - sizeof(struct pending) - sizeof(uint64_t)];
} pending[MAX_VCPUS] __attribute__((aligned(BLOCK_ALIGN)));

/* Where the clock's interrupt begins and ends; 0: nowhere. */
static uint64_t clock_begin, clock_end;

/* By line: a bit for each vCPU that holds it. */
static uint64_t *holders;
static uint64_t n_lines;

/* All memory at one place, of n_lines, if the kernel has it; at 0 it has not. */
static uint64_t direct_map;

/* Transfers of the vCPUs from this one on are not counted. */
static unsigned int n_recorded = MAX_VCPUS;

/* Files to remove when the guest begins to run; NULL if none. */
static char *to_remove[3];

/* Ascending; not written after installation, so translating threads share it freely. */
static uint64_t *functions;
static uint32_t n_functions;

/* Open addressing: number + 1 of the place with this address; guarded by places_lock. */
static pthread_mutex_t places_lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t *place_index;
static uint32_t place_mask;

static bool in_kernel(uint64_t vaddr)
{
	return vaddr >> 63;
}

/*
 * What a callback has to know of its instruction, in the pointer that QEMU keeps for it: the code's
 * number, whether it is the kernel's, and as much of the address as identifies it.
 */
#define INSN_BITS	43

static void *pack(uint32_t code, uint64_t vaddr)
{
	return (void *)(uintptr_t)((uint64_t)code << (INSN_BITS + 1) |
				   (uint64_t)in_kernel(vaddr) << INSN_BITS |
				   (vaddr & ((1ULL << INSN_BITS) - 1)));
}

static uint32_t code_of(void *insn)
{
	return (uint32_t)((uintptr_t)insn >> (INSN_BITS + 1));
}

static enum mode mode_of(void *insn)
{
	return (uintptr_t)insn >> INSN_BITS & 1 ? KERNEL : USER;
}

static uint64_t scatter(uint64_t key)
{
	/* The golden ratio's fraction; the high bits are the well-mixed ones. */
	return (key * 0x9e3779b97f4a7c15u) >> 20;
}

/* The slot of this code and line, taken if need be; NULL if there is none left near its place. */
static struct sharing_slot *slot_of(uint64_t key, uint64_t vaddr)
{
	uint64_t at = scatter(key);
	int i;

	for (i = 0; i < MAX_PROBES; i++, at++) {
		struct sharing_slot *slot = &slots[at & slots_mask];
		uint64_t found = __atomic_load_n(&slot->key, __ATOMIC_RELAXED);

		if (!found && __atomic_compare_exchange_n(&slot->key, &found, key, false,
							  __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
			__atomic_store_n(&slot->vaddr, vaddr, __ATOMIC_RELAXED);
			return slot;
		}
		if (found == key)
			return slot;
	}
	return NULL;
}

static void add(uint64_t *count, uint64_t number)
{
	__atomic_fetch_add(count, number, __ATOMIC_RELAXED);
}

static void transfer(unsigned int vcpu, void *insn, uint64_t line, bool store, uint64_t vaddr)
{
	struct sharing_block *block = blocks[vcpu];
	struct pending *load = &pending[vcpu].load;
	enum mode mode = pending[vcpu].in_clock ? CLOCK : mode_of(insn);
	struct sharing_slot *slot = NULL;

	if (vcpu >= n_recorded || !__atomic_load_n(&header->recording, __ATOMIC_RELAXED)) {
		load->valid = false;
		return;
	}
	if (store && load->valid && load->insn == insn && load->line == line) {
		load->valid = false;
		block->loads[mode]--;
		block->stores[mode]++;
		block->merged++;
		if (load->slot) {
			add(&load->slot->loads, -1ULL);
			add(&load->slot->stores, 1);
		}
		return;
	}
	if (mode != CLOCK) {
		slot = slot_of(line << CODE_BITS | code_of(insn), vaddr);
		if (!slot)
			block->overflow++;
	}
	if (store) {
		block->stores[mode]++;
		if (slot)
			add(&slot->stores, 1);
		load->valid = false;
	} else {
		block->loads[mode]++;
		if (slot)
			add(&slot->loads, 1);
		*load = (struct pending){ insn, line, slot, true };
	}
}

static void touch(unsigned int vcpu, void *insn, uint64_t line, bool store, uint64_t vaddr)
{
	uint64_t me = 1ULL << vcpu, before;

	if (line >= n_lines)
		return;
	before = __atomic_load_n(&holders[line], __ATOMIC_RELAXED);
	if (store) {
		if (before == me)
			return;
		before = __atomic_exchange_n(&holders[line], me, __ATOMIC_RELAXED);
	} else {
		if (before & me)
			return;
		before = __atomic_fetch_or(&holders[line], me, __ATOMIC_RELAXED);
	}
	if (before & ~me)
		transfer(vcpu, insn, line, store, vaddr);
}

/* Where the access at vaddr goes; false if not to memory. */
static bool physical(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, uint64_t *paddr)
{
	struct qemu_plugin_hwaddr *address;

	if (direct_map && (vaddr - direct_map) >> LINE_SHIFT < n_lines) {
		*paddr = vaddr - direct_map;
		return true;
	}
	address = qemu_plugin_get_hwaddr(info, vaddr);
	if (!address) {
		blocks[vcpu]->unseen++;
		return false;
	}
	if (qemu_plugin_hwaddr_is_io(address))
		return false;
	*paddr = qemu_plugin_hwaddr_phys_addr(address);
	return true;
}

static void accessed(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *insn)
{
	uint64_t last = vaddr + (1u << qemu_plugin_mem_size_shift(info)) - 1;
	bool store = qemu_plugin_mem_is_store(info);
	uint64_t paddr;

	if (physical(vcpu, info, vaddr, &paddr))
		touch(vcpu, insn, paddr >> LINE_SHIFT, store, vaddr);
	else
		paddr = 0;
	if (vaddr >> LINE_SHIFT == last >> LINE_SHIFT)
		return;
	/* Aligned accesses never come here. The next page can be anywhere. */
	if (vaddr >> PAGE_SHIFT != last >> PAGE_SHIFT) {
		vaddr = last >> PAGE_SHIFT << PAGE_SHIFT;
		if (physical(vcpu, info, vaddr, &paddr))
			touch(vcpu, insn, paddr >> LINE_SHIFT, store, vaddr);
	} else if (paddr) {
		touch(vcpu, insn, (paddr >> LINE_SHIFT) + 1, store, last);
	}
}

static void begin_clock(unsigned int vcpu, void *unused)
{
	(void)unused;
	pending[vcpu].in_clock = 1;
}

static void end_clock(unsigned int vcpu, void *unused)
{
	(void)unused;
	pending[vcpu].in_clock = 0;
}

static uint32_t place_of(uint64_t vaddr)
{
	uint64_t address = vaddr >> PLACE_SHIFT << PLACE_SHIFT, at = scatter(address);
	uint32_t number;

	pthread_mutex_lock(&places_lock);
	while ((number = place_index[at & place_mask]) && places[number - 1] != address)
		at++;
	if (!number && header->used_places < header->places) {
		places[header->used_places] = address;
		number = header->used_places + 1;
		place_index[at & place_mask] = number;
		__atomic_store_n(&header->used_places, number, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&places_lock);
	return number ? CODE_FUNCTIONS + n_functions + number - 1 : CODE_UNKNOWN;
}

/* The number of the code that this instruction belongs to. */
static uint32_t find_code(uint64_t vaddr)
{
	uint32_t low = 0, high = n_functions;

	if (!in_kernel(vaddr))
		return CODE_USER;
	if (!n_functions || vaddr < functions[0] || vaddr >= MODULES)
		return place_of(vaddr);
	/* The last function that does not begin behind vaddr. */
	while (high - low > 1) {
		uint32_t middle = low + (high - low) / 2;

		if (functions[middle] <= vaddr)
			low = middle;
		else
			high = middle;
	}
	return CODE_FUNCTIONS + low;
}

/* Of several vCPUs that come here at a time, each may do it: it is the same for all. */
static void begin_running(void)
{
	size_t i;

	for (i = 0; i < sizeof(to_remove) / sizeof(to_remove[0]) && to_remove[i]; i++)
		unlink(to_remove[i]);
	__atomic_store_n(&header->state, STATE_RUNNING, __ATOMIC_RELEASE);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t i, n = qemu_plugin_tb_n_insns(tb);

	(void)id;
	if (__atomic_load_n(&header->state, __ATOMIC_RELAXED) == STATE_LOADED)
		begin_running();
	for (i = 0; i < n; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		uint64_t vaddr = qemu_plugin_insn_vaddr(insn);

		qemu_plugin_register_vcpu_mem_cb(insn, accessed, QEMU_PLUGIN_CB_NO_REGS,
						 QEMU_PLUGIN_MEM_RW, pack(find_code(vaddr), vaddr));
		/* Whoever calls may leave the prologue out, or a part of it. */
		if (vaddr - clock_begin <= PROLOGUE_BYTES)
			qemu_plugin_register_vcpu_insn_exec_cb(insn, begin_clock,
							       QEMU_PLUGIN_CB_NO_REGS, NULL);
		if (vaddr - clock_end <= PROLOGUE_BYTES)
			qemu_plugin_register_vcpu_insn_exec_cb(insn, end_clock,
							       QEMU_PLUGIN_CB_NO_REGS, NULL);
	}
}

static void ended(qemu_plugin_id_t id, void *unused)
{
	(void)id;
	(void)unused;
	__atomic_store_n(&header->state, STATE_ENDED, __ATOMIC_RELEASE);
}

/* Whether `number` items of `size` bytes lie within the file, aligned, from `offset` on. */
static bool fits(uint64_t bytes, uint64_t offset, uint64_t number, uint64_t size)
{
	return offset >= sizeof(*header) && offset % BLOCK_ALIGN == 0 && offset <= bytes &&
	       number * size <= bytes - offset;
}

static int check_header(const char *path, uint64_t bytes)
{
	if (memcmp(header->magic, SHARING_MAGIC, sizeof(header->magic)) ||
	    header->layout != SHARING_LAYOUT)
		return refuse("%s: not a sharing file of layout %d", path, SHARING_LAYOUT);
	if (header->state != STATE_NEW)
		return refuse("%s: already used by another QEMU", path);
	if (!header->vcpus || header->vcpus > MAX_VCPUS ||
	    header->block_bytes < sizeof(struct sharing_block) ||
	    header->block_bytes % BLOCK_ALIGN ||
	    (uint64_t)CODE_FUNCTIONS + header->functions + header->places > MAX_CODES ||
	    !header->slots || header->slots & (header->slots - 1) ||
	    !fits(bytes, header->blocks_offset, header->vcpus, header->block_bytes) ||
	    !fits(bytes, header->places_offset, header->places, sizeof(*places)) ||
	    !fits(bytes, header->slots_offset, header->slots, sizeof(*slots)))
		return refuse("%s: the header does not fit the file", path);
	return 0;
}

static int map_counters(const char *path)
{
	uint64_t bytes;
	unsigned int i;
	char *map;

	map = map_file(path, sizeof(*header), &bytes);
	if (!map)
		return -1;
	header = (void *)map;
	if (check_header(path, bytes))
		return -1;
	for (i = 0; i < header->vcpus; i++)
		blocks[i] = (void *)(map + header->blocks_offset + (size_t)i * header->block_bytes);
	places = (void *)(map + header->places_offset);
	slots = (void *)(map + header->slots_offset);
	slots_mask = header->slots - 1;
	return 0;
}

static int read_functions(const char *path)
{
	FILE *file = fopen(path, "r");
	char line[64];

	if (!file)
		return refuse("%s: %s", path, strerror(errno));
	functions = calloc(header->functions + 1, sizeof(*functions));
	while (functions && fgets(line, sizeof(line), file)) {
		uint64_t vaddr;
		int used = 0;

		if (sscanf(line, "%" SCNx64 " %n", &vaddr, &used) != 1 || line[used] ||
		    (n_functions && vaddr <= functions[n_functions - 1])) {
			fclose(file);
			return refuse("%s:%u: not a hex address above the last", path,
				      n_functions + 1);
		}
		if (n_functions == header->functions) {
			fclose(file);
			return refuse("%s: more than %u functions", path, header->functions);
		}
		functions[n_functions++] = vaddr;
	}
	fclose(file);
	if (!functions)
		return refuse("no memory for %u functions", header->functions);
	if (n_functions != header->functions)
		return refuse("%s names %u functions, the header %u", path, n_functions,
			      header->functions);
	return 0;
}

static int make_state(const char *text)
{
	uint32_t size = 2;
	char *end;
	unsigned long mib = strtoul(text, &end, 10);

	if (*end || !mib || mib > MAX_MEMORY_MIB)
		return refuse("memory_mib=%s: give 1 to %d", text, MAX_MEMORY_MIB);
	n_lines = (uint64_t)mib << (20 - LINE_SHIFT);
	/* Zeros that take no memory until they are touched. */
	holders = mmap(NULL, n_lines * sizeof(*holders), PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	/* At most half full, so that searches are short. */
	while (size < 2 * header->places)
		size *= 2;
	place_index = calloc(size, sizeof(*place_index));
	place_mask = size - 1;
	if (holders == MAP_FAILED || !place_index)
		return refuse("no memory for the state of %lu MiB", mib);
	header->memory_mib = (uint32_t)mib;
	return 0;
}

/* A hex address of the kernel's half, or 0, which is said. */
static uint64_t kernel_address(const char *name, const char *text)
{
	char *end;
	uint64_t address = strtoull(text, &end, 16);

	if (!*end && in_kernel(address))
		return address;
	refuse("%s=%s: not a hex address of the kernel's half", name, text);
	return 0;
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	const char *counters = NULL, *list = NULL, *size = NULL, *memory = NULL;
	const char *direct = NULL, *recorded = NULL, *begins = NULL, *ends = NULL;
	char *end;
	int i;

	for (i = 0; i < argc; i++) {
		if (value_of(argv[i], "counters"))
			counters = value_of(argv[i], "counters");
		else if (value_of(argv[i], "functions"))
			list = value_of(argv[i], "functions");
		else if (value_of(argv[i], "memory_mib"))
			size = value_of(argv[i], "memory_mib");
		else if (value_of(argv[i], "direct"))
			direct = value_of(argv[i], "direct");
		else if (value_of(argv[i], "recorded"))
			recorded = value_of(argv[i], "recorded");
		else if (value_of(argv[i], "clock"))
			begins = value_of(argv[i], "clock");
		else if (value_of(argv[i], "clock_end"))
			ends = value_of(argv[i], "clock_end");
		else if (value_of(argv[i], "memory"))
			memory = value_of(argv[i], "memory");
		else
			return refuse("unknown argument %s", argv[i]);
	}
	if (!counters || !list || !size)
		return refuse("arguments: counters=PATH,functions=PATH,memory_mib=N"
			      "[,direct=ADDRESS][,recorded=N][,clock=ADDRESS,clock_end=ADDRESS]"
			      "[,memory=PATH]");
	if (!begins != !ends)
		return refuse("clock and clock_end: give both or neither");
	if (!info->system_emulation || strcmp(info->target_name, "x86_64"))
		return refuse("only for qemu-system-x86_64, this is a QEMU for %s",
			      info->target_name);
	if (map_counters(counters) || read_functions(list))
		return -1;
	/* Checked here, once, so that no callback has to. */
	if (info->system.max_vcpus < 0 || (uint32_t)info->system.max_vcpus > header->vcpus)
		return refuse("the guest has %d vCPUs (maxcpus), %s has room for %u",
			      info->system.max_vcpus, counters, header->vcpus);
	if (make_state(size))
		return -1;
	if (direct) {
		direct_map = kernel_address("direct", direct);
		if (!direct_map)
			return -1;
	}
	if (begins) {
		clock_begin = kernel_address("clock", begins);
		clock_end = kernel_address("clock_end", ends);
		if (!clock_begin || !clock_end)
			return -1;
	}
	if (recorded) {
		n_recorded = (unsigned int)strtoul(recorded, &end, 10);
		if (*end || !n_recorded)
			return refuse("recorded=%s: not a number of vCPUs", recorded);
	}
	if (memory) {
		to_remove[0] = strdup(memory);
		to_remove[1] = strdup(counters);
		to_remove[2] = strdup(list);
	}

	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, ended, NULL);
	header->api_version = (uint32_t)info->version.cur;
	header->guest_vcpus = (uint32_t)info->system.smp_vcpus;
	__atomic_store_n(&header->state, STATE_LOADED, __ATOMIC_RELEASE);
	return 0;
}
