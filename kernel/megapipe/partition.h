/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * MegaPipe: the interface behind which the listening socket is partitioned.
 *
 * mp_register() of a listening TCP socket with a CPU mask calls ->open(), and
 * the handle then accepts from what that returns. The mask holds only CPUs that
 * this machine may have, and at least one. It is there during the call only: to
 * keep it, alloc_cpumask_var() and cpumask_copy().
 */
#ifndef MEGAPIPE_PARTITION_H
#define MEGAPIPE_PARTITION_H

#include <linux/cpumask.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/net.h>

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
 * Make a socket with the address of @listener and the options that its
 * connections inherit, the length of its queue (sk_max_ack_backlog) and its
 * congestion control. It is known to nobody yet and does not listen. ERR_PTR():
 * -EINVAL, @listener does not listen; -EOPNOTSUPP, it has something that is not
 * copied (SO_REUSEPORT, a filter, keys for MD5 or AO, a ULP, fast open, IP
 * options, time stamps, a delay); -ENOMEM, ...
 */
struct socket *mp_listener_copy(struct file *listener);

/* Release what mp_listener_copy() has made, and its mask, if it has not come to listen. */
void mp_listener_discard(struct socket *copy);

/*
 * The kernel's side. The first two want the socket's lock (lock_sock()), the
 * third takes it:
 *
 *   int inet_csk_listen_on_cpus(struct sock *sk, const struct cpumask *cpus);
 *
 * (patch 4 of the series, net/inet_connection_sock.h): from now on @sk takes
 * only handshakes that arrive on @cpus, of which it keeps a copy; NULL: all.
 * A listening socket with a mask is preferred to one without at the same
 * address; of several with one CPU in common, an unspecified one gets them.
 *
 *   int inet_csk_listen_start(struct sock *sk);
 *
 * what listen() does: binds @sk to the port that it has, and listens. To an
 * address that is in use it binds only if sk->sk_reuse is SK_FORCE_REUSE.
 *
 *   sock->ops->shutdown(sock, SHUT_RDWR)
 *
 * ends listening: when it returns nothing comes into the socket's queue any more,
 * and the connections in it have been reset. Of those half open, one is reset
 * when its last step arrives, the rest are forgotten when their timers run out.
 * (fput() alone would do the same, but later: a file is closed when the task
 * returns to user space.)
 */

#endif
