// SPDX-License-Identifier: GPL-2.0-only
/*
 * Lab 2: each core accepts from a queue of its own.
 *
 * You write the two functions below; kernel/megapipe/partition.h says when each
 * is called and what you may call, kernel/megapipe/partition_plain.c is the
 * plain way that you replace. The module calls your functions for channels that
 * were created with MP_PARTITION, and the plain ones for all others.
 *
 * A part is a second listening socket with a mask of CPUs. The kernel gives a
 * handshake to the socket whose mask holds the CPU on which it arrived, and to
 * the original if there is none. What the kernel does not know is which parts
 * belong together, and that no CPU may be in two of them.
 */
#include <linux/file.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/slab.h>

#include "partition.h"

/* BEGIN SOLUTION */
struct part {
	struct list_head link;
	struct file *listener;	/* what it is a part of; the handle holds it */
	struct file *file;	/* the clone */
	cpumask_var_t cpus;
};

/*
 * All parts of all listeners, whichever channel has them. @parts_lock guards the
 * list, and is held from the question whether the CPUs are free until they are
 * taken, and while they are given back.
 */
static LIST_HEAD(parts);
static DEFINE_MUTEX(parts_lock);

/* The same socket may have been registered through another file. */
static bool same_socket(struct file *a, struct file *b)
{
	return file_inode(a) == file_inode(b);
}

static void free_part(struct part *p)
{
	free_cpumask_var(p->cpus);
	kfree(p);
}

static bool cpus_taken(struct file *listener, const struct cpumask *cpus)
{
	struct part *p;

	list_for_each_entry(p, &parts, link)
		if (same_socket(p->listener, listener) && cpumask_intersects(p->cpus, cpus))
			return true;
	return false;
}

/* END SOLUTION */
/* STUDENT: make a listening socket for these CPUs; no CPU is in two parts of one listener. */
static struct file *partitioned_open(struct file *listener, const struct cpumask *cpus)
{
	/* BEGIN SOLUTION */
	struct file *file;
	struct part *p;

	p = kzalloc(sizeof(*p), GFP_KERNEL_ACCOUNT);
	if (!p)
		return ERR_PTR(-ENOMEM);
	if (!alloc_cpumask_var(&p->cpus, GFP_KERNEL_ACCOUNT)) {
		kfree(p);
		return ERR_PTR(-ENOMEM);
	}
	p->listener = listener;
	cpumask_copy(p->cpus, cpus);

	mutex_lock(&parts_lock);
	if (cpus_taken(listener, cpus))
		file = ERR_PTR(-EBUSY);
	else
		file = mp_listener_clone(listener, cpus);
	if (!IS_ERR(file)) {
		p->file = file;
		list_add(&p->link, &parts);
	}
	mutex_unlock(&parts_lock);

	if (IS_ERR(file))
		free_part(p);
	return file;
	/* ELSE STARTER */
	//| return mp_shared_ops.open(listener, cpus);
	/* END SOLUTION */
}

/* STUDENT: give the CPUs back: from now on their handshakes are the original's again. */
static void partitioned_close(struct file *listener, struct file *file)
{
	/* BEGIN SOLUTION */
	struct part *p;

	mutex_lock(&parts_lock);
	list_for_each_entry(p, &parts, link) {
		if (p->file == file) {
			list_del(&p->link);
			break;
		}
	}
	/* Only when it has stopped may somebody else have its CPUs. */
	mp_listener_stop(file);
	mutex_unlock(&parts_lock);
	free_part(p);
	fput(file);
	/* ELSE STARTER */
	//| mp_shared_ops.close(listener, file);
	/* END SOLUTION */
}

const struct mp_partition_ops mp_partitioned_ops = {
	.open	= partitioned_open,
	.close	= partitioned_close,
};
