// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Stands in for QEMU: has the real sharing.c in it, and makes the accesses that it is told. A line
 * of its input is
 *
 *   on | off                         the reader's switch
 *   VCPU OP INSN VADDR SHIFT [END]   vCPU's instruction at address INSN accesses 2^SHIFT bytes:
 *                                    OP r loads, w stores, m loads and then stores (as vCPUs in
 *                                    turns do it), a does both at once (as threads do it). With
 *                                    END, accesses every 64 bytes from VADDR to END.
 *
 * An address's low 28 bits are its physical address, but those that begin with e are not memory,
 * and those with f are not known.
 */
#include "sharing.c"

struct qemu_plugin_insn {
	uint64_t vaddr;
	qemu_plugin_vcpu_mem_cb_t cb;
	void *udata;
	qemu_plugin_vcpu_udata_cb_t executed;
};
struct qemu_plugin_tb {
	struct qemu_plugin_insn insn;
};
struct qemu_plugin_hwaddr {
	uint64_t paddr;
};

#define STORE 0x100

#include "fake_qemu.h"

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb)
{
	(void)tb;
	return 1;
}
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index)
{
	(void)index;
	return (struct qemu_plugin_insn *)&tb->insn;
}
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *insn, qemu_plugin_vcpu_mem_cb_t cb,
				      enum qemu_plugin_cb_flags flags, enum qemu_plugin_mem_rw rw,
				      void *userdata)
{
	(void)flags;
	(void)rw;
	insn->cb = cb;
	insn->udata = userdata;
}
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn,
					    qemu_plugin_vcpu_udata_cb_t cb,
					    enum qemu_plugin_cb_flags flags, void *userdata)
{
	(void)flags;
	(void)userdata;
	insn->executed = cb;
}
unsigned int qemu_plugin_mem_size_shift(qemu_plugin_meminfo_t info)
{
	return info & 0xff;
}
bool qemu_plugin_mem_is_store(qemu_plugin_meminfo_t info)
{
	return info & STORE;
}
struct qemu_plugin_hwaddr *qemu_plugin_get_hwaddr(qemu_plugin_meminfo_t info, uint64_t vaddr)
{
	static struct qemu_plugin_hwaddr address;

	(void)info;
	address.paddr = vaddr & 0xfffffff;
	return address.paddr >> 24 == 0xf ? NULL : &address;
}
bool qemu_plugin_hwaddr_is_io(const struct qemu_plugin_hwaddr *address)
{
	return address->paddr >> 24 == 0xe;
}
uint64_t qemu_plugin_hwaddr_phys_addr(const struct qemu_plugin_hwaddr *address)
{
	return address->paddr;
}

int main(int argc, char **argv)
{
	char line[128];

	if (qemu_plugin_install(1, &info, argc - 1, argv + 1))
		return 1;
	while (fgets(line, sizeof(line), stdin)) {
		unsigned long long insn, vaddr, end;
		unsigned int vcpu, shift;
		char op;
		int n = sscanf(line, "%u %c %llx %llx %u %llx", &vcpu, &op, &insn, &vaddr, &shift,
			       &end);

		if (n < 5) {
			header->recording = !strcmp(line, "on\n");
			continue;
		}
		for (end = n == 6 ? end : vaddr + 1; vaddr < end; vaddr += 64) {
			struct qemu_plugin_tb tb = { .insn.vaddr = insn };

			trans(1, &tb);
			if (tb.insn.executed)
				tb.insn.executed(vcpu, NULL);
			if (op == 'r' || op == 'm')
				tb.insn.cb(vcpu, shift, vaddr, tb.insn.udata);
			if (op != 'r')
				tb.insn.cb(vcpu, shift | STORE, vaddr, tb.insn.udata);
		}
	}
	at_exit(1, NULL);
	return 0;
}
