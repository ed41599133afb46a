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
};

static struct kmem_cache *cache;

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
	kmem_cache_free(cache, container_of(sock, struct lwsocket, sock));
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
	 * and whoever waits in the new one looks at the socket first.
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
	.convert	= lightweight_convert,
};
