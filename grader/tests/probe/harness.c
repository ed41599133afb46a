// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Stands in for QEMU: has the real probe.c in it, and executes the blocks that it is told.
 * A line of its input: vcpu, address of the first instruction, instructions (of 4 bytes), times.
 */
#include "probe.c"

struct qemu_plugin_insn {
	uint64_t vaddr;
	int n;
	struct { qemu_plugin_vcpu_udata_cb_t cb; void *udata; } calls[4];
};
struct qemu_plugin_tb {
	size_t n;
	struct qemu_plugin_insn insns[64];
	int calls_n;
	struct { qemu_plugin_vcpu_udata_cb_t cb; void *udata; } calls[4];
};

#include "fake_qemu.h"

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb)
{
	return tb->n;
}
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index)
{
	return (struct qemu_plugin_insn *)&tb->insns[index];
}
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb,
					  qemu_plugin_vcpu_udata_cb_t cb,
					  enum qemu_plugin_cb_flags flags, void *userdata)
{
	(void)flags;
	tb->calls[tb->calls_n].cb = cb;
	tb->calls[tb->calls_n++].udata = userdata;
}
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn,
					    qemu_plugin_vcpu_udata_cb_t cb,
					    enum qemu_plugin_cb_flags flags, void *userdata)
{
	(void)flags;
	insn->calls[insn->n].cb = cb;
	insn->calls[insn->n++].udata = userdata;
}

int main(int argc, char **argv)
{
	unsigned long long vaddr, n, times;
	unsigned int vcpu;
	size_t i;
	int j;

	if (qemu_plugin_install(1, &info, argc - 1, argv + 1))
		return 1;
	while (scanf("%u %llx %llu %llu", &vcpu, &vaddr, &n, &times) == 4) {
		struct qemu_plugin_tb tb = { .n = n };

		for (i = 0; i < n; i++)
			tb.insns[i].vaddr = vaddr + 4 * i;
		trans(1, &tb);
		while (times--) {
			for (j = 0; j < tb.calls_n; j++)
				tb.calls[j].cb(vcpu, tb.calls[j].udata);
			for (i = 0; i < n; i++)
				for (j = 0; j < tb.insns[i].n; j++)
					tb.insns[i].calls[j].cb(vcpu, tb.insns[i].calls[j].udata);
		}
	}
	at_exit(1, NULL);
	return 0;
}
