/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * MegaPipe: the interface behind which lightweight sockets live.
 *
 * An lwsocket is a TCP connection that belongs to a channel and to nothing
 * else: a struct sock, and the struct socket that the operations take, but no
 * inode, no dentry, no struct file and no descriptor.
 *
 * Numbers, handles and limits are the given code's; here is what the thing is
 * made of.
 */
#ifndef MEGAPIPE_LWSOCKET_H
#define MEGAPIPE_LWSOCKET_H

#include <linux/fs.h>
#include <linux/net.h>

#include "channel.h"
struct mp_lwsocket_ops {
	/* When the module is loaded and unloaded. 0 or a negative errno. */
	int (*init)(void);
	void (*exit)(void);

	/*
	 * Owner, may sleep. Memory for an lwsocket, in which connections come
	 * and go; or ERR_PTR(): -ENOMEM; -EOPNOTSUPP, make ordinary descriptors
	 * instead. A packet for the connection before may still be looking at
	 * it when the next one is accepted.
	 */
	struct socket *(*alloc)(void);

	/* Any task, may sleep. There is no connection in it. */
	void (*free)(struct socket *lw);

	/*
	 * Owner, may sleep. Take the next connection out of the queue of
	 * @listener into @lw, without waiting for one. 0 or a negative errno:
	 * -EAGAIN, there is none; -EINVAL, it listens no more; ...
	 */
	int (*accept)(struct socket *listener, struct socket *lw);

	/*
	 * Owner, or whoever closes the channel; may sleep. Close the
	 * connection. Nobody watches it or waits in @lw's wait queue, but a packet
	 * may arrive on another CPU at this moment.
	 */
	void (*close)(struct socket *lw);

	/*
	 * Owner, softirqs may be off: must not sleep. Tell @h of what happens to the connection, until
	 * ->unwatch(), by mp_handle_notify(): EPOLLIN, there may be something
	 * to read, the end of the stream included; EPOLLOUT, there is room to
	 * write again; EPOLLERR, there is an error to report; EPOLLHUP, the
	 * connection has changed its state. To say too much costs time, to say
	 * too little makes somebody wait for ever. Returns false if @lw cannot
	 * be watched, because somebody else (a BPF program) has sk_user_data:
	 * the module then joins its wait queue, as for any socket.
	 *
	 * Called when @h first has to wait, not each time. What has happened
	 * before is not yours: the module looks again afterwards. EPOLLHUP only
	 * means here: look again.
	 *
	 * mp_handle_notify(h, events) makes the handle ready if it waits for
	 * one of the events; EPOLLERR and EPOLLHUP end every wait. Any context;
	 * it takes the channel's lock. @h must stay until it returns.
	 */
	bool (*watch)(struct socket *lw, struct mp_handle *h);

	/*
	 * Owner, or whoever closes the channel; may sleep. Only after ->watch()
	 * has returned true. When this returns nobody looks at the handle any
	 * more, on whatever CPU, and what was changed is as it was.
	 */
	void (*unwatch)(struct socket *lw);

	/*
	 * Owner, may sleep. Make an ordinary socket of the connection, packets
	 * arriving meanwhile: returns its file (no descriptor yet), and there
	 * is no connection in @lw; or ERR_PTR() and nothing has changed. Nobody
	 * waits in @lw's wait queue, and it is not watched.
	 */
	struct file *(*convert)(struct socket *lw);
};

extern const struct mp_lwsocket_ops mp_lightweight_ops;	/* the lab's mp_lwsocket.c */

/*
 * The kernel's side, from patch 3 of the series (linux/socket.h):
 *
 *   int sock_accept_bare(struct socket *sock, struct socket *newsock,
 *			  struct proto_accept_arg *arg);
 *
 * fills in @newsock but for its wait queue, which must have been initialised
 * (init_waitqueue_head(&newsock->wq.wait)); sock_release(newsock) closes it.
 * Readers of sk->sk_wq hold nothing but rcu_read_lock(), so the memory of a
 * wait queue must remain one for a grace period after the release.
 */

#endif
