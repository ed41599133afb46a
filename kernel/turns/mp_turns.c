// SPDX-License-Identifier: GPL-2.0-only
/*
 * mp_turns - short turns for the CPUs of an emulator that runs one at a time
 *
 * In deterministic virtual time QEMU lets a CPU run until the next timer of the machine is due,
 * which can be millions of instructions away, and then goes on with the next CPU. This makes the
 * PIT, which Linux does not use once it has better clocks, such a timer: channel 0 as a rate
 * generator, its interrupt masked. The guest does not notice; only the turns become short.
 */
#include <linux/i8253.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/module.h>

static unsigned short ticks = 12;
module_param(ticks, ushort, 0444);
MODULE_PARM_DESC(ticks, "length of a turn in periods of the PIT, 838 ns each; at least 2");

static int __init mp_turns_init(void)
{
	unsigned long flags;

	if (ticks < 2)
		return -EINVAL;
	/* The line of the PIT: nobody waits for it any more. */
	disable_irq(0);
	/* i8253_lock: the three accesses belong together. */
	raw_spin_lock_irqsave(&i8253_lock, flags);
	outb_p(0x34, PIT_MODE);		/* channel 0, low and high byte, mode 2 */
	outb_p(ticks & 0xff, PIT_CH0);
	outb_p(ticks >> 8, PIT_CH0);
	raw_spin_unlock_irqrestore(&i8253_lock, flags);
	return 0;
}
module_init(mp_turns_init);

MODULE_DESCRIPTION("Short turns for the CPUs of an emulator");
MODULE_LICENSE("GPL");
