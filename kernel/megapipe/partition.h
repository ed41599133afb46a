/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * MegaPipe: the interface behind which the listening socket is partitioned.
 *
 * mp_register() of a listening TCP socket with a CPU mask calls ->open(), and
 * the handle then accepts from what that returns. The mask is a copy, holds
 * only CPUs that this machine may have, and at least one.
 */
#ifndef MEGAPIPE_PARTITION_H
#define MEGAPIPE_PARTITION_H

#include <linux/cpumask.h>
#include <linux/file.h>
#include <linux/fs.h>

struct mp_partition_ops {
	/*
	 * May sleep, from any channel at any time. Return the file (a
	 * reference) of a listening socket for the connections of @listener
	 * whose handshakes arrive on @cpus; or ERR_PTR(): -EBUSY, another part
	 * of this listener has one of the CPUs; -EOPNOTSUPP, -ENOMEM, ...
	 * @listener stays open until ->close(), whatever its user does.
	 */
	struct file *(*open)(struct file *listener, const struct cpumask *cpus);

	/*
	 * May sleep. The handle for which @part was opened goes: drop the
	 * reference, and give the CPUs back before returning.
	 */
	void (*close)(struct file *listener, struct file *part);
};

extern const struct mp_partition_ops mp_shared_ops;	/* partition_plain.c */
extern const struct mp_partition_ops mp_partitioned_ops;	/* the lab's mp_partition.c */

/*
 * Make another listening socket at the address of @listener, with the same
 * options, that takes only handshakes which arrive on @cpus; @listener keeps
 * those of all other CPUs. Of several such sockets with one CPU in common, an
 * unspecified one gets them. Returns its file (non-blocking, no descriptor) or
 * ERR_PTR(): -EINVAL, @listener does not listen; -EOPNOTSUPP, it has something
 * that cannot be copied (SO_REUSEPORT, a filter, keys for MD5 or AO, a ULP,
 * fast open); -ENOMEM, ...
 */
struct file *mp_listener_clone(struct file *listener, const struct cpumask *cpus);

/*
 * Stop such a socket: when this returns no handshake is given to it any more,
 * and the connections in its queue, half-open ones included, have been reset.
 */
void mp_listener_stop(struct file *clone);

#endif
