// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Stands in for QEMU: has the real stacks.c in it, and executes the blocks that it is told.
 * A line of its input: vcpu, address of the first instruction, instructions (of 8 bytes), how the
 * last one ends the block, and the stack's address that it uses. "?" is answered when all before
 * it is done. The environment's API is the version of the interface that it speaks.
 */
#include "stacks.c"

struct qemu_plugin_insn {
	uint64_t vaddr;
	unsigned char bytes[8];
	qemu_plugin_vcpu_udata_cb_t cb;
	void *udata;
	qemu_plugin_vcpu_mem_cb_t mem;
	void *mem_udata;
};
struct qemu_plugin_tb {
	size_t n;
	struct qemu_plugin_insn insns[64];
	qemu_plugin_vcpu_udata_cb_t cb;
	void *udata;
};

enum { LOAD, STORE };

#include "fake_qemu.h"
static int api;

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb)
{
	return tb->n;
}
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index)
{
	return (struct qemu_plugin_insn *)&tb->insns[index];
}
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn)
{
	return sizeof(insn->bytes);
}
bool qemu_plugin_mem_is_store(qemu_plugin_meminfo_t info)
{
	return info == STORE;
}

/* The old call returns where the bytes are, the new one copies them. */
uintptr_t insn_data(const struct qemu_plugin_insn *insn, void *dest, size_t len);
uintptr_t insn_data(const struct qemu_plugin_insn *insn, void *dest, size_t len)
{
	if (api < 3)
		return (uintptr_t)insn->bytes;
	memcpy(dest, insn->bytes, len);
	return len;
}
__asm__(".globl qemu_plugin_insn_data\n.set qemu_plugin_insn_data, insn_data");

void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb,
					  qemu_plugin_vcpu_udata_cb_t cb,
					  enum qemu_plugin_cb_flags flags, void *userdata)
{
	(void)flags;
	tb->cb = cb;
	tb->udata = userdata;
}
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn,
					    qemu_plugin_vcpu_udata_cb_t cb,
					    enum qemu_plugin_cb_flags flags, void *userdata)
{
	(void)flags;
	insn->cb = cb;
	insn->udata = userdata;
}
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *insn, qemu_plugin_vcpu_mem_cb_t cb,
				      enum qemu_plugin_cb_flags flags, enum qemu_plugin_mem_rw rw,
				      void *userdata)
{
	(void)flags;
	(void)rw;
	insn->mem = cb;
	insn->mem_udata = userdata;
}

static const struct {
	const char *name;
	unsigned char bytes[8];
	int accesses;
	int kinds[2];
} ends[] = {
	{ "-", { 0x90 }, 0, { 0 } },
	{ "call", { 0xe8, 1, 2, 3, 4 }, 1, { STORE } },
	{ "call*reg", { 0x41, 0xff, 0xd3 }, 1, { STORE } },
	{ "call*mem", { 0xff, 0x15, 1, 2, 3, 4 }, 2, { LOAD, STORE } },
	{ "jmp*mem", { 0xff, 0x25, 1, 2, 3, 4 }, 1, { LOAD } },
	{ "ret", { 0xc3 }, 1, { LOAD } },
	{ "bndret", { 0xf2, 0xc3 }, 1, { LOAD } },
	{ "iret", { 0x48, 0xcf }, 0, { 0 } },
	{ "sysret", { 0x48, 0x0f, 0x07 }, 0, { 0 } },
};

int main(int argc, char **argv)
{
	/* What QEMU 7.2 calls once more, from a helper, after a block that ended with RET. */
	struct qemu_plugin_insn stale = { 0 };
	unsigned long long vaddr, n, address;
	char line[200], end[20];
	unsigned int vcpu;
	size_t i;
	int j;

	api = info.version.cur = atoi(getenv("API"));
	if (qemu_plugin_install(1, &info, argc - 1, argv + 1))
		return 1;
	while (fgets(line, sizeof(line), stdin)) {
		struct qemu_plugin_tb tb = { 0 };
		struct qemu_plugin_insn *last;

		if (line[0] == '?') {
			puts("done");
			fflush(stdout);
			continue;
		}
		if (sscanf(line, "%u %llx %llu %19s %llx", &vcpu, &vaddr, &n, end, &address) != 5)
			return 2;
		tb.n = n;
		last = &tb.insns[n - 1];
		for (i = 0; i < n; i++)
			tb.insns[i].vaddr = vaddr + 8 * i;
		for (i = 0; strcmp(ends[i].name, end); i++)
			if (i + 1 == sizeof(ends) / sizeof(ends[0]))
				return 3;
		memcpy(last->bytes, ends[i].bytes, sizeof(last->bytes));
		trans(1, &tb);
		tb.cb(vcpu, tb.udata);
		if (last->cb)
			last->cb(vcpu, last->udata);
		if (!strcmp(end, "iret") && stale.mem)
			for (j = 0; j < 5; j++)
				stale.mem(vcpu, LOAD, address + 8 * j, stale.mem_udata);
		for (j = 0; last->mem && j < ends[i].accesses; j++)
			last->mem(vcpu, ends[i].kinds[j],
				  ends[i].kinds[j] == STORE || ends[i].accesses == 1 ?
					  address :
					  0xffffffff82200000,
				  last->mem_udata);
		if (ends[i].accesses)
			stale = *last;
	}
	at_exit(1, NULL);
	return 0;
}
