// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The stack probe: a QEMU TCG plugin that counts every instruction at its call path.
 *
 * It needs neither registers nor frame pointers. The store of a CALL and the load of a RET give
 * the address of the return address, and that is enough to keep one shadow stack for each stack
 * of the guest:
 *
 *   CALL at S   everything at or below S is gone; a frame begins at S
 *   RET at S    everything at or below S is gone
 *
 * A frame belongs to the function whose code runs in it just now. So a tail call renames the
 * frame, and a thunk that overwrites its return address (retpolines) comes out right by itself.
 * Thunks are marked transparent: what runs in one is counted where it was called.
 *
 * A stack is known by its pages: stacks lie between guard pages, so a page next to a known one
 * is the same stack. An access to another stack is one of three things:
 *
 *   - a context switch: a RET, or a CALL in the functions marked so. That stack's frames are as
 *     they were when it was left;
 *   - the kernel moving to an IRQ stack: a CALL on a stack without frames. The path goes on from
 *     the stack that was left, to which we return when the new one is empty again;
 *   - an entry moving from its entry stack to the task's: a CALL while nothing but the entry's
 *     own frame is there.
 *
 * The processor pushes by itself when it takes an interrupt, and no callback tells. So functions
 * marked as entries (asm_sysvec_*, entry_SYSCALL_64) begin a new path, which IRET ends.
 * All user code is one node.
 *
 * Counts lie in a file that the reader made and both map. Arguments: counters=PATH, and perhaps
 * recorded=N: only what the first N vCPUs execute is counted. The file has
 *
 *   struct stacks_header
 *   functions  sorted by address, each up to the next; labels and kinds as the reader wants
 *   late       room for more of them, for modules, which the reader may add at any time
 *   nodes      a hash table of {parent, label, instructions, entries}
 *
 * What does not fit is counted as lost, never dropped: the sum over all nodes is what the probe
 * (probe.c) counts, for both count a block whole when it is entered.
 */
#define PLUGIN_NAME "stacks"
#include "plugin.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef PROBE_API_VERSION
#error "compile with -DPROBE_API_VERSION=<the plugin interface version of the QEMU at hand>"
#endif

#define STACKS_MAGIC	"MPSTACK\n"
#define STACKS_LAYOUT	2
#define MAX_VCPUS	64
#define MAX_DEPTH	256
#define PAGE_SHIFT	12
#define PAGE_SLOTS	(1u << 15)

enum { STATE_NEW, STATE_COUNTING, STATE_ENDED };

/* Labels below LABEL_FUNCTIONS have a fixed meaning; the reader chooses the others. */
enum { LABEL_NONE, LABEL_USER, LABEL_UNKNOWN, LABEL_LOST, LABEL_FUNCTIONS };

enum kind {
	KIND_PLAIN,
	KIND_ENTRY,		/* begins a path: the processor jumps here */
	KIND_TASK,		/* begins a path and its stack: the first code of a new task */
	KIND_SWITCH,		/* leaves one stack for another task's */
	KIND_TRANSPARENT,	/* counted where it was called */
	KIND_EXIT,		/* likewise, and its IRET, like an entry's, ends an interrupt */
};

struct function {
	uint64_t vaddr;
	uint32_t label;
	uint32_t kind;
};

struct node {
	uint64_t key;		/* parent << 32 | label; 0: free */
	uint64_t instructions;
	uint64_t entries;	/* calls of the function, and jumps into it from others */
};

/* Nodes that are there from the beginning, at these places. */
enum { NODE_ROOT, NODE_LOST, NODE_USER, NODES_FIXED };

struct stacks_header {
	char magic[8];
	uint32_t layout;
	uint32_t vcpus;
	uint32_t functions;
	uint32_t late_room;
	uint32_t node_slots;	/* a power of two */
	uint32_t late;		/* written by the reader at any time, as is the next: */
	uint32_t generation;	/* odd while late functions are being changed */
	uint32_t state;		/* written by the plugin, as is what follows */
	uint32_t api_version;
	uint32_t nodes;
	uint64_t lost_frames;	/* calls deeper than MAX_DEPTH */
	uint64_t lost_stacks;	/* accesses to more stacks than there is room for */
	uint64_t functions_offset;
	uint64_t late_offset;
	uint64_t nodes_offset;
};

struct frame {
	uint64_t address;	/* of its return address */
	uint64_t returns_to;
	uint32_t parent;	/* nodes */
	uint32_t node;
	uint32_t label;
	bool entry;		/* what the processor pushed for an interrupt: IRET removes it */
};

struct stack {
	struct stack *link;	/* where the path goes on when this one is empty */
	unsigned int depth;
	struct frame frames[MAX_DEPTH];
};

struct vcpu {
	struct stack *stack;
	const struct block *block;	/* that runs just now */
	uint32_t node;
	uint32_t label;
	bool floating;		/* an entry that has no frame yet: its first CALL shows where */
	bool from_user;		/* ... and it came from user mode, so that stack is empty */
	bool returned;		/* by a RET that ended no frame */
	struct stack scratch;
} __attribute__((aligned(128)));

/* What a translated block's callbacks need to know. */
struct block {
	uint64_t vaddr;
	uint64_t end;
	uint32_t instructions;
	uint32_t label;
	uint32_t kind;
	uint32_t generation;
};

QEMU_PLUGIN_EXPORT int qemu_plugin_version = PROBE_API_VERSION;

static struct stacks_header *header;
static struct function *functions, *late;
static struct node *nodes;
static struct vcpu vcpus[MAX_VCPUS];
static unsigned int n_recorded = MAX_VCPUS;

/* Pages of stacks. A slot's stack is written before its page, and neither changes after. */
static struct {
	uint64_t page;
	struct stack *stack;
} pages[PAGE_SLOTS];
static unsigned int n_pages;
static bool pages_locked;

/* --- nodes --- */

static uint64_t mixed(uint64_t key)
{
	key ^= key >> 32;
	key *= 0x9e3779b97f4a7c15ull;
	return key ^ key >> 29;
}

static uint32_t child(uint32_t parent, uint32_t label)
{
	uint64_t key = (uint64_t)parent << 32 | label;
	uint32_t mask = header->node_slots - 1, slot = mixed(key) & mask;

	if (parent == NODE_LOST)
		return NODE_LOST;
	for (;; slot = (slot + 1) & mask) {
		uint64_t found = __atomic_load_n(&nodes[slot].key, __ATOMIC_RELAXED);

		if (found == key && slot >= NODES_FIXED)
			return slot;
		if (found || slot < NODES_FIXED)
			continue;
		/* An eighth stays free, so that every search ends soon. */
		if (__atomic_load_n(&header->nodes, __ATOMIC_RELAXED) >= mask - mask / 8)
			return NODE_LOST;
		if (__atomic_compare_exchange_n(&nodes[slot].key, &found, key, false,
						__ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
			__atomic_add_fetch(&header->nodes, 1, __ATOMIC_RELAXED);
			return slot;
		}
		if (found == key)
			return slot;
	}
}

static void count(unsigned int vcpu, uint32_t node, uint32_t instructions)
{
	if (vcpu >= n_recorded)
		return;
	__atomic_add_fetch(&nodes[node].instructions, instructions, __ATOMIC_RELAXED);
}

/* --- functions --- */

static const struct function *last_not_above(const struct function *table, uint32_t n,
					     uint64_t vaddr)
{
	uint32_t low = 0, high = n;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (table[middle].vaddr <= vaddr)
			low = middle + 1;
		else
			high = middle;
	}
	return low ? &table[low - 1] : NULL;
}

static void resolve(struct block *block)
{
	const struct function *found;
	uint32_t generation;

	found = last_not_above(functions, header->functions, block->vaddr);
	if (found && found->label != LABEL_UNKNOWN) {
		block->label = found->label;
		block->kind = found->kind;
		return;
	}
	generation = __atomic_load_n(&header->generation, __ATOMIC_ACQUIRE);
	block->label = LABEL_UNKNOWN;
	block->kind = KIND_PLAIN;
	if (generation & 1)
		return;
	found = last_not_above(late, header->late, block->vaddr);
	if (found) {
		struct function copy = *found;

		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (__atomic_load_n(&header->generation, __ATOMIC_RELAXED) != generation)
			return;
		block->label = copy.label;
		block->kind = copy.kind;
	}
	block->generation = generation;
}

/* --- stacks --- */

static struct stack *find_page(uint64_t page)
{
	uint32_t slot = mixed(page) % PAGE_SLOTS;
	uint64_t found;

	for (;; slot = (slot + 1) % PAGE_SLOTS) {
		found = __atomic_load_n(&pages[slot].page, __ATOMIC_ACQUIRE);
		if (found == page)
			return pages[slot].stack;
		if (!found)
			return NULL;
	}
}

static struct stack *add_page(uint64_t page)
{
	uint32_t slot = mixed(page) % PAGE_SLOTS;
	struct stack *stack;

	while (__atomic_test_and_set(&pages_locked, __ATOMIC_ACQUIRE))
		;
	stack = find_page(page);
	if (!stack && n_pages < PAGE_SLOTS - PAGE_SLOTS / 8) {
		stack = find_page(page + 1);
		if (!stack)
			stack = find_page(page - 1);
		if (!stack)
			stack = calloc(1, sizeof(*stack));
		if (stack) {
			while (pages[slot].page)
				slot = (slot + 1) % PAGE_SLOTS;
			pages[slot].stack = stack;
			__atomic_store_n(&pages[slot].page, page, __ATOMIC_RELEASE);
			n_pages++;
		}
	}
	__atomic_clear(&pages_locked, __ATOMIC_RELEASE);
	return stack;
}

static struct stack *stack_at(struct vcpu *vcpu, uint64_t address)
{
	uint64_t page = address >> PAGE_SHIFT;
	struct stack *stack = find_page(page);

	if (!stack)
		stack = add_page(page);
	if (!stack) {
		__atomic_add_fetch(&header->lost_stacks, 1, __ATOMIC_RELAXED);
		stack = &vcpu->scratch;
	}
	return stack;
}

static struct frame *top(const struct stack *stack)
{
	return stack && stack->depth ? (struct frame *)&stack->frames[stack->depth - 1] : NULL;
}

/* End all frames at or below `address`; say whether there was one. */
static bool drop(struct stack *stack, uint64_t address)
{
	unsigned int before = stack->depth;

	while (stack->depth && stack->frames[stack->depth - 1].address <= address)
		stack->depth--;
	return stack->depth != before;
}

static void push(struct stack *stack, struct frame frame)
{
	if (stack->depth == MAX_DEPTH)
		__atomic_add_fetch(&header->lost_frames, 1, __ATOMIC_RELAXED);
	else
		stack->frames[stack->depth++] = frame;
}

/* The frame of an entry, or the first of a stack: what lies below it never ends it. */
static void push_entry(struct stack *stack, uint32_t node, uint32_t label)
{
	struct frame *under = top(stack);

	push(stack, (struct frame){ .address = under ? under->address - 1 : UINT64_MAX,
				    .parent = NODE_ROOT,
				    .node = node,
				    .label = label,
				    .entry = true });
}

/* The vCPU runs in the top frame of its stack, or of the one that this one was entered from. */
static void settle(struct vcpu *vcpu)
{
	struct frame *frame;

	while (vcpu->stack && !vcpu->stack->depth && vcpu->stack->link) {
		struct stack *link = vcpu->stack->link;

		vcpu->stack->link = NULL;
		vcpu->stack = link;
	}
	frame = top(vcpu->stack);
	vcpu->floating = !frame;
	vcpu->from_user = false;
	vcpu->node = frame ? frame->node : NODE_ROOT;
	vcpu->label = frame ? frame->label : LABEL_NONE;
}

static void rename_top(struct vcpu *vcpu, uint32_t label)
{
	struct frame *frame = vcpu->floating ? NULL : top(vcpu->stack);

	vcpu->node = child(frame ? frame->parent : NODE_ROOT, label);
	vcpu->label = label;
	if (frame) {
		frame->node = vcpu->node;
		frame->label = label;
	}
}

/*
 * --- what the guest does ---
 *
 * QEMU 7.2 forgets to take back the callbacks for accesses by helpers when a block is left by a
 * RET. The next helper that accesses memory (IRET's) then makes them, so whoever is called asks
 * whether his block is the one that runs. Nor does it make all callbacks that are registered for
 * loads only, or for stores only: each is registered for both and asks which it is.
 */

static void called(unsigned int index, qemu_plugin_meminfo_t info, uint64_t address, void *data)
{
	struct vcpu *vcpu = &vcpus[index];
	struct stack *stack, *from = vcpu->stack;
	const struct block *block = data;
	uint32_t parent = vcpu->node;

	/* CALL through memory loads the target first. */
	if (vcpu->block != block || !qemu_plugin_mem_is_store(info))
		return;
	vcpu->block = NULL;
	stack = stack_at(vcpu, address);
	if (vcpu->floating) {
		if (vcpu->from_user)
			stack->depth = 0;
		else
			drop(stack, address);
		if (stack != from)
			stack->link = from;
		push_entry(stack, vcpu->node, vcpu->label);
	} else if (stack == from) {
		drop(stack, address);
		parent = top(stack) ? top(stack)->node : (uint32_t)NODE_ROOT;
	} else if (from->depth == 1 && top(from)->entry && !from->link &&
		   block->kind != KIND_SWITCH) {
		/* From the entry stack to the task's, of which the kernel uses nothing yet. */
		stack->depth = 0;
		stack->link = NULL;
		push_entry(stack, vcpu->node, vcpu->label);
	} else {
		drop(stack, address);
		if (!stack->depth && block->kind != KIND_SWITCH) {
			stack->link = from;
		} else {
			stack->link = NULL;
			if (!stack->depth)
				push_entry(stack, NODE_ROOT, LABEL_NONE);
			vcpu->stack = stack;
			rename_top(vcpu, block->label);
			parent = vcpu->node;
		}
	}
	push(stack, (struct frame){ .address = address,
				    .returns_to = block->end,
				    .parent = parent,
				    .node = parent });
	vcpu->stack = stack;
	vcpu->floating = false;
	vcpu->from_user = false;
	vcpu->node = parent;
	vcpu->label = LABEL_NONE;
}

static void returned(unsigned int index, qemu_plugin_meminfo_t info, uint64_t address, void *data)
{
	struct vcpu *vcpu = &vcpus[index];
	struct stack *stack;

	if (vcpu->block != data || qemu_plugin_mem_is_store(info))
		return;
	vcpu->block = NULL;
	stack = stack_at(vcpu, address);
	/* An entry that returns without a call: to its own code. */
	if (vcpu->floating && (stack == vcpu->stack || vcpu->from_user))
		return;
	vcpu->stack = stack;
	/* Some entry code moves its return address: then only the place returned to tells. */
	vcpu->returned = !drop(stack, address);
	settle(vcpu);
}

static void left_for_user(unsigned int index, void *data)
{
	struct vcpu *vcpu = &vcpus[index];

	(void)data;
	vcpu->stack = NULL;
	vcpu->block = NULL;
	vcpu->floating = true;
	vcpu->from_user = true;
	vcpu->returned = false;
	vcpu->label = LABEL_NONE;
	vcpu->node = NODE_ROOT;
}

static void interrupt_returned(unsigned int index, void *data)
{
	struct vcpu *vcpu = &vcpus[index];
	struct stack *stack = vcpu->stack;
	unsigned int depth;

	(void)data;
	if (!stack)
		return;
	if (!vcpu->floating)
		for (depth = stack->depth; depth--;)
			if (stack->frames[depth].entry) {
				stack->depth = depth;
				break;
			}
	if (stack->depth || stack->link)
		settle(vcpu);
	else
		left_for_user(index, NULL);
}

static void run_user(unsigned int index, void *instructions)
{
	left_for_user(index, NULL);
	count(index, NODE_USER, (uint32_t)(uintptr_t)instructions);
}

static void run(unsigned int index, void *data)
{
	struct vcpu *vcpu = &vcpus[index];
	const struct block *block = data;

	vcpu->block = block;
	if (vcpu->returned) {
		struct frame *frame = vcpu->floating ? NULL : top(vcpu->stack);

		vcpu->returned = false;
		if (frame && !frame->entry && frame->returns_to == block->vaddr) {
			vcpu->stack->depth--;
			settle(vcpu);
		}
	}
	if (block->label != vcpu->label && block->kind != KIND_TRANSPARENT &&
	    block->kind != KIND_EXIT) {
		if (block->kind == KIND_ENTRY || block->kind == KIND_TASK) {
			if (block->kind == KIND_TASK && vcpu->stack) {
				vcpu->stack->depth = 0;
				vcpu->stack->link = NULL;
			}
			if (!vcpu->floating) {
				vcpu->floating = true;
				vcpu->from_user = false;
			}
		}
		rename_top(vcpu, block->label);
		if (index < n_recorded)
			__atomic_add_fetch(&nodes[vcpu->node].entries, 1, __ATOMIC_RELAXED);
	}
	count(index, vcpu->node, block->instructions);
}

static void run_unknown(unsigned int index, void *data)
{
	struct block *block = data;

	/* Modules that have been made known since. */
	if (__atomic_load_n(&header->generation, __ATOMIC_RELAXED) != block->generation)
		resolve(block);
	run(index, data);
}

/* --- translation --- */

enum flow { FLOW_OTHER, FLOW_CALL, FLOW_RET, FLOW_IRET, FLOW_SYSRET };

static enum flow flow_of(const unsigned char *bytes, size_t size)
{
	size_t i = 0;

	while (i < size && (bytes[i] == 0x66 || bytes[i] == 0x67 || bytes[i] == 0xf2 ||
			    bytes[i] == 0xf3 || bytes[i] == 0x2e || bytes[i] == 0x36 ||
			    bytes[i] == 0x3e || bytes[i] == 0x26 || bytes[i] == 0x64 ||
			    bytes[i] == 0x65))
		i++;
	if (i < size && (bytes[i] & 0xf0) == 0x40)
		i++;
	if (i == size)
		return FLOW_OTHER;
	switch (bytes[i]) {
	case 0xe8:
		return FLOW_CALL;
	case 0xff:
		/* Group 5: /2 is the near indirect CALL. */
		return i + 1 < size && (bytes[i + 1] >> 3 & 7) == 2 ? FLOW_CALL : FLOW_OTHER;
	case 0xc2:
	case 0xc3:
		return FLOW_RET;
	case 0xcf:
		return FLOW_IRET;
	case 0x0f:
		return i + 1 < size && bytes[i + 1] == 0x07 ? FLOW_SYSRET : FLOW_OTHER;
	default:
		return FLOW_OTHER;
	}
}

static enum flow flow(const struct qemu_plugin_insn *insn)
{
	unsigned char copy[INSN_BYTES];
	size_t size;
	const void *bytes = insn_bytes(insn, header->api_version, copy, &size);

	return flow_of(bytes, size);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t n = qemu_plugin_tb_n_insns(tb);
	struct qemu_plugin_insn *last;
	struct block *block;
	uint64_t start;

	(void)id;
	if (!n)
		return;
	start = qemu_plugin_insn_vaddr(qemu_plugin_tb_get_insn(tb, 0));
	if (!(start >> 63)) {
		qemu_plugin_register_vcpu_tb_exec_cb(tb, run_user, QEMU_PLUGIN_CB_NO_REGS,
						     (void *)(uintptr_t)n);
		return;
	}
	/* Never freed: QEMU does not say when a block goes. Some MiB in an hour. */
	block = calloc(1, sizeof(*block));
	if (!block) {
		fputs("stacks: no memory\n", stderr);
		abort();
	}
	last = qemu_plugin_tb_get_insn(tb, n - 1);
	block->vaddr = start;
	block->end = qemu_plugin_insn_vaddr(last) + qemu_plugin_insn_size(last);
	block->instructions = (uint32_t)n;
	resolve(block);
	qemu_plugin_register_vcpu_tb_exec_cb(tb,
					     block->label == LABEL_UNKNOWN ? run_unknown : run,
					     QEMU_PLUGIN_CB_NO_REGS, block);
	/* All of these end a block. The kernel also uses IRET to serialise, which is no return. */
	switch (flow(last)) {
	case FLOW_CALL:
		qemu_plugin_register_vcpu_mem_cb(last, called, QEMU_PLUGIN_CB_NO_REGS,
						 QEMU_PLUGIN_MEM_RW, block);
		break;
	case FLOW_RET:
		qemu_plugin_register_vcpu_mem_cb(last, returned, QEMU_PLUGIN_CB_NO_REGS,
						 QEMU_PLUGIN_MEM_RW, block);
		break;
	case FLOW_IRET:
		if (block->kind == KIND_ENTRY || block->kind == KIND_EXIT)
			qemu_plugin_register_vcpu_insn_exec_cb(last, interrupt_returned,
							       QEMU_PLUGIN_CB_NO_REGS, block);
		break;
	case FLOW_SYSRET:
		/* Not every return to user mode runs user code: an interrupt may be waiting. */
		qemu_plugin_register_vcpu_insn_exec_cb(last, left_for_user, QEMU_PLUGIN_CB_NO_REGS,
						       block);
		break;
	case FLOW_OTHER:
		break;
	}
}

static void ended(qemu_plugin_id_t id, void *unused)
{
	(void)id;
	(void)unused;
	__atomic_store_n(&header->state, STATE_ENDED, __ATOMIC_RELEASE);
}

/* --- installation --- */

static bool fits(uint64_t offset, uint64_t n, uint64_t size, uint64_t bytes)
{
	return offset >= sizeof(*header) && !(offset % 8) && offset <= bytes &&
	       n <= (bytes - offset) / size;
}

static int map_counters(const char *path)
{
	uint64_t bytes;
	char *map;

	map = map_file(path, sizeof(*header), &bytes);
	if (!map)
		return -1;
	header = (void *)map;
	if (memcmp(header->magic, STACKS_MAGIC, sizeof(header->magic)) ||
	    header->layout != STACKS_LAYOUT)
		return refuse("%s: not a file of stacks of layout %d", path, STACKS_LAYOUT);
	if (header->state != STATE_NEW)
		return refuse("%s: already used by another QEMU", path);
	if (!header->vcpus || header->vcpus > MAX_VCPUS || header->late > header->late_room ||
	    header->node_slots < 64 || header->node_slots & (header->node_slots - 1) ||
	    !fits(header->functions_offset, header->functions, sizeof(*functions), bytes) ||
	    !fits(header->late_offset, header->late_room, sizeof(*late), bytes) ||
	    !fits(header->nodes_offset, header->node_slots, sizeof(*nodes), bytes))
		return refuse("%s: the header does not fit the file", path);
	functions = (void *)(map + header->functions_offset);
	late = (void *)(map + header->late_offset);
	nodes = (void *)(map + header->nodes_offset);
	return 0;
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	const char *counters = argc > 0 ? value_of(argv[0], "counters") : NULL;
	const char *recorded = argc > 1 ? value_of(argv[1], "recorded") : NULL;
	unsigned int i;
	char *end;

	if (!counters || argc > 2 || (argc == 2 && !recorded))
		return refuse("arguments: counters=PATH[,recorded=N]");
	if (recorded) {
		n_recorded = (unsigned int)strtoul(recorded, &end, 10);
		if (*end || !n_recorded)
			return refuse("recorded=%s: not a number of vCPUs", recorded);
	}
	if (!info->system_emulation || strcmp(info->target_name, "x86_64"))
		return refuse("only for qemu-system-x86_64, this is a QEMU for %s",
			      info->target_name);
	if (map_counters(counters))
		return -1;
	if (info->system.max_vcpus < 0 || (uint32_t)info->system.max_vcpus > header->vcpus)
		return refuse("the guest has %d vCPUs (maxcpus), there is room for %u",
			      info->system.max_vcpus, header->vcpus);
	for (i = 0; i < MAX_VCPUS; i++)
		vcpus[i].floating = true;
	nodes[NODE_LOST].key = LABEL_LOST;
	nodes[NODE_USER].key = LABEL_USER;
	header->nodes = NODES_FIXED;
	header->api_version = (uint32_t)info->version.cur;

	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, ended, NULL);
	__atomic_store_n(&header->state, STATE_COUNTING, __ATOMIC_RELEASE);
	return 0;
}
