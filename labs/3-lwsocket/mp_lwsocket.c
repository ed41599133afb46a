// SPDX-License-Identifier: GPL-2.0-only
/*
 * Lab 3: a connection without inode, dentry, struct file and descriptor.
 *
 * You write the functions below; kernel/megapipe/lwsocket.h says when each is
 * called and what you may call. The module calls your functions for channels
 * that were created with MP_LWSOCKET. The plain way that you replace is an
 * ordinary descriptor: it is what the module makes when your alloc says
 * EOPNOTSUPP.
 *
 * What a short connection pays for its descriptor, and never uses: an inode and
 * a dentry in sockfs, a struct file, a slot in the descriptor table, and all of
 * it again when it is closed.
 */
#include <linux/file.h>
#include <linux/net.h>
#include <linux/slab.h>
#include <linux/socket.h>
#include <net/sock.h>

#include "lwsocket.h"

/* BEGIN SOLUTION */
struct lwsocket {
	struct socket sock;
	/* The connection's own callbacks, while it is watched. */
	void (*data_ready)(struct sock *sk);
	void (*write_space)(struct sock *sk);
	void (*state_change)(struct sock *sk);
	void (*error_report)(struct sock *sk);
};

static struct kmem_cache *cache;

static struct lwsocket *lwsocket_of(struct socket *sock)
{
	return container_of(sock, struct lwsocket, sock);
}

/* Once for each piece of memory, however many lwsockets it is in turn. */
static void lwsocket_construct(void *memory)
{
	struct lwsocket *lw = memory;

	memset(lw, 0, sizeof(*lw));
	init_waitqueue_head(&lw->sock.wq.wait);
}

/* END SOLUTION */
/* STUDENT: make what your lwsockets are allocated from. Who may still look at one that is free? */
static int lightweight_init(void)
{
	/* BEGIN SOLUTION */
	/*
	 * A packet that arrives while the connection is closed may find sk_wq
	 * just before it is cleared, and look at the wait queue under RCU. With
	 * SLAB_TYPESAFE_BY_RCU it finds a wait queue there, this one or that of
	 * another lwsocket, on which a wake-up for nothing does no harm; and no
	 * close has to wait for a grace period.
	 */
	cache = kmem_cache_create("mp_lwsocket", sizeof(struct lwsocket), 0,
				  SLAB_TYPESAFE_BY_RCU | SLAB_HWCACHE_ALIGN | SLAB_ACCOUNT,
				  lwsocket_construct);
	return cache ? 0 : -ENOMEM;
	/* ELSE STARTER */
	//| return 0;
	/* END SOLUTION */
}

/* STUDENT: undo lightweight_init(). */
static void lightweight_exit(void)
{
	/* BEGIN SOLUTION */
	kmem_cache_destroy(cache);
	/* END SOLUTION */
}

/* STUDENT: memory for one; it is used for one connection after another. */
static struct socket *lightweight_alloc(void)
{
	/* BEGIN SOLUTION */
	struct lwsocket *lw = kmem_cache_alloc(cache, GFP_KERNEL);

	return lw ? &lw->sock : ERR_PTR(-ENOMEM);
	/* ELSE STARTER */
	//| return ERR_PTR(-EOPNOTSUPP);
	/* END SOLUTION */
}

/* STUDENT: undo lightweight_alloc(). */
static void lightweight_free(struct socket *sock)
{
	/* BEGIN SOLUTION */
	kmem_cache_free(cache, lwsocket_of(sock));
	/* END SOLUTION */
}

/* STUDENT: take the next connection out of the listener's queue, with nothing around it. */
static int lightweight_accept(struct socket *listener, struct socket *sock)
{
	/* BEGIN SOLUTION */
	struct proto_accept_arg arg = { .flags = O_NONBLOCK };

	return sock_accept_bare(listener, sock, &arg);
	/* ELSE STARTER */
	//| return -EOPNOTSUPP;
	/* END SOLUTION */
}

/* STUDENT: close the connection. */
static void lightweight_close(struct socket *sock)
{
	/* BEGIN SOLUTION */
	sock_release(sock);
	/* END SOLUTION */
}

/* BEGIN SOLUTION */
/*
 * Nobody else can wait for an lwsocket, so TCP's callbacks tell the handle
 * itself, which costs less than a wait queue. sk_callback_lock is read by them
 * and written by watch and unwatch: the handle in sk_user_data stays one while
 * a callback looks at it. They come in any context but hard interrupts.
 */
static void tell(struct sock *sk, __poll_t events)
{
	struct mp_handle *h;

	read_lock_bh(&sk->sk_callback_lock);
	h = sk->sk_user_data;
	if (h)
		mp_handle_notify(h, events);
	read_unlock_bh(&sk->sk_callback_lock);
}

static void told_data_ready(struct sock *sk)
{
	tell(sk, EPOLLIN);
}

static void told_write_space(struct sock *sk)
{
	/* Called when an acknowledgment has freed some; a third of the buffer is room. */
	if (!sk_stream_is_writeable(sk))
		return;
	clear_bit(SOCK_NOSPACE, &sk->sk_socket->flags);
	tell(sk, EPOLLOUT);
}

static void told_state_change(struct sock *sk)
{
	/* With an error it is told as one, right after this. */
	if (!READ_ONCE(sk->sk_err))
		tell(sk, EPOLLIN | EPOLLOUT | EPOLLHUP);
}

static void told_error_report(struct sock *sk)
{
	tell(sk, EPOLLERR);
}

/* END SOLUTION */
/* STUDENT: tell the handle what happens to the connection, from now on. */
static bool lightweight_watch(struct socket *sock, struct mp_handle *h)
{
	/* BEGIN SOLUTION */
	struct lwsocket *lw = lwsocket_of(sock);
	struct sock *sk = sock->sk;
	bool ours;

	write_lock_bh(&sk->sk_callback_lock);
	/* Or has somebody (a BPF program) put something of theirs on top of it? */
	ours = !sk->sk_user_data;
	if (ours) {
		lw->data_ready = sk->sk_data_ready;
		lw->write_space = sk->sk_write_space;
		lw->state_change = sk->sk_state_change;
		lw->error_report = sk->sk_error_report;
		sk->sk_user_data = h;
		/* Whoever calls them reads them without the lock. */
		WRITE_ONCE(sk->sk_data_ready, told_data_ready);
		WRITE_ONCE(sk->sk_write_space, told_write_space);
		WRITE_ONCE(sk->sk_state_change, told_state_change);
		WRITE_ONCE(sk->sk_error_report, told_error_report);
	}
	write_unlock_bh(&sk->sk_callback_lock);
	return ours;
	/* ELSE STARTER */
	//| return false;
	/* END SOLUTION */
}

/* STUDENT: undo lightweight_watch(); nobody looks at the handle when this returns. */
static void lightweight_unwatch(struct socket *sock)
{
	/* BEGIN SOLUTION */
	struct lwsocket *lw = lwsocket_of(sock);
	struct sock *sk = sock->sk;

	write_lock_bh(&sk->sk_callback_lock);
	sk->sk_user_data = NULL;
	WRITE_ONCE(sk->sk_data_ready, lw->data_ready);
	WRITE_ONCE(sk->sk_write_space, lw->write_space);
	WRITE_ONCE(sk->sk_state_change, lw->state_change);
	WRITE_ONCE(sk->sk_error_report, lw->error_report);
	write_unlock_bh(&sk->sk_callback_lock);
	/* END SOLUTION */
}

/* STUDENT: make an ordinary socket of it, while packets arrive. */
static struct file *lightweight_convert(struct socket *sock)
{
	/* BEGIN SOLUTION */
	struct sock *sk = sock->sk;
	struct socket *full;
	struct file *file;

	full = sock_alloc();
	if (!full)
		return ERR_PTR(-ENFILE);
	full->type = sock->type;
	full->ops = sock->ops;
	__module_get(full->ops->owner);
	/* Before the connection moves, for this may fail; it then releases @full. */
	file = sock_alloc_file(full, O_NONBLOCK, sk->sk_prot_creator->name);
	if (IS_ERR(file))
		return file;

	/*
	 * The socket's lock keeps its own timers and packets away, the lock for
	 * callbacks (inside sock_graft()) those who only look at sk_socket. Who
	 * has read sk_wq before may still wake the old queue; nobody is in it,
	 * and whoever joins the new one looks at the socket then.
	 */
	lock_sock(sk);
	full->state = sock->state;
	full->flags |= sock->flags & (BIT(SOCK_NOSPACE) | BIT(SOCK_SUPPORT_ZC));
	sock->sk = NULL;
	sock_graft(sk, full);
	release_sock(sk);

	/* Nothing is left in it but the reference to its module. */
	module_put(sock->ops->owner);
	return file;
	/* ELSE STARTER */
	//| return ERR_PTR(-EOPNOTSUPP);
	/* END SOLUTION */
}

const struct mp_lwsocket_ops mp_lightweight_ops = {
	.init		= lightweight_init,
	.exit		= lightweight_exit,
	.alloc		= lightweight_alloc,
	.free		= lightweight_free,
	.accept		= lightweight_accept,
	.close		= lightweight_close,
	.watch		= lightweight_watch,
	.unwatch	= lightweight_unwatch,
	.convert	= lightweight_convert,
};
