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
 * Make a socket with the address of @listener and everything else that its user
 * has set: options, length of the queue (sk_max_ack_backlog), congestion
 * control. It is known to nobody yet and does not listen. ERR_PTR(): -EINVAL,
 * @listener does not listen; -EOPNOTSUPP, it has something that cannot be
 * copied (SO_REUSEPORT, a filter, keys for MD5 or AO, a ULP, fast open);
 * -ENOMEM, ...
 */
struct socket *mp_listener_copy(struct file *listener);

/* Release what mp_listener_copy() has made, and its mask, if it has not come to listen. */
void mp_listener_discard(struct socket *copy);

/*
 * The kernel's side, all of it under the socket's lock (lock_sock()):
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
 * (this one takes the lock itself) ends listening: when it returns no handshake
 * is given to the socket any more, and the connections in its queue, half-open
 * ones included, have been reset.
 */

#endif
