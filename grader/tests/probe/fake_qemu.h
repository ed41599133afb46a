/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What all that stand in for QEMU have in common. Included after the plugin and after struct
 * qemu_plugin_insn, which has a vaddr.
 */
static qemu_plugin_vcpu_tb_trans_cb_t trans;
static qemu_plugin_udata_cb_t at_exit;

static qemu_info_t info = { .target_name = "x86_64", .version = { 1, 1 },
			    .system_emulation = true,
			    .system = { .smp_vcpus = 2, .max_vcpus = 2 } };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, qemu_plugin_vcpu_tb_trans_cb_t cb)
{
	(void)id;
	trans = cb;
}
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, qemu_plugin_udata_cb_t cb, void *data)
{
	(void)id;
	(void)data;
	at_exit = cb;
}
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn)
{
	return insn->vaddr;
}
