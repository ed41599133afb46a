// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe without partitioning: whatever the mask, every channel accepts from
 * the one queue of the listening socket. It is right, and its lock, its queue
 * and every connection in it move from core to core.
 */
#include "partition.h"

static struct file *shared_open(struct file *listener, const struct cpumask *cpus)
{
	return get_file(listener);
}

static void shared_close(struct file *listener, struct file *part)
{
	fput(part);
}

const struct mp_partition_ops mp_shared_ops = {
	.open	= shared_open,
	.close	= shared_close,
};
