// SPDX-License-Identifier: GPL-2.0-only
/* Lightweight sockets, written another way. It compiles; no more. */
#include <linux/completion.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/llist.h>
#include <linux/mempool.h>
#include <linux/net.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/socket.h>
#include <linux/tcp.h>
#include <net/inet_sock.h>
#include <net/sock.h>
#include <net/tcp.h>

#include "lwsocket.h"

struct light {
	struct socket sock;
	struct rcu_head rcu;
	struct llist_node spare;
};

static struct kmem_cache *lights;
static mempool_t *pool;
static LLIST_HEAD(spares);
static atomic_long_t alive;

static int enter(void)
{
	lights = KMEM_CACHE(light, SLAB_HWCACHE_ALIGN | SLAB_ACCOUNT);
	if (!lights)
		return -ENOMEM;
	pool = mempool_create_slab_pool(16, lights);
	if (!pool) {
		kmem_cache_destroy(lights);
		return -ENOMEM;
	}
	return 0;
}

static void leave(void)
{
	rcu_barrier();
	WARN_ON(atomic_long_read(&alive));
	mempool_destroy(pool);
	kmem_cache_destroy(lights);
}

static struct socket *alloc(void)
{
	struct llist_node *spare = llist_del_first(&spares);
	struct light *l;

	if (spare)
		l = llist_entry(spare, struct light, spare);
	else
		l = mempool_alloc(pool, GFP_KERNEL);
	if (!l)
		return ERR_PTR(-ENOMEM);
	memset(&l->sock, 0, sizeof(l->sock));
	init_waitqueue_head(&l->sock.wq.wait);
	atomic_long_inc(&alive);
	return &l->sock;
}

static void free_light(struct rcu_head *rcu)
{
	mempool_free(container_of(rcu, struct light, rcu), pool);
	atomic_long_dec(&alive);
}

static void release(struct socket *sock)
{
	call_rcu(&container_of(sock, struct light, sock)->rcu, free_light);
}

static int accept(struct socket *listener, struct socket *sock)
{
	struct proto_accept_arg arg = { .flags = O_NONBLOCK };
	struct sock *sk;
	int ret;

	if (listener->sk->sk_state != TCP_LISTEN)
		return -EINVAL;
	ret = sock_accept_bare(listener, sock, &arg);
	if (ret)
		return ret;
	sk = sock->sk;
	write_lock_bh(&sk->sk_callback_lock);
	rcu_assign_pointer(sk->sk_wq, &sock->wq);
	write_unlock_bh(&sk->sk_callback_lock);
	return sock->state == SS_CONNECTED ? 0 : -ECONNABORTED;
}

static void close(struct socket *sock)
{
	struct sock *sk = sock->sk;

	if (sk && refcount_read(&sk->sk_refcnt) > 1)
		synchronize_rcu();
	if (sock->ops)
		sock_release(sock);
}

static struct file *convert(struct socket *sock)
{
	struct socket *full = sock_alloc();
	struct sock *sk = sock->sk;
	struct file *file;
	bool slow;

	if (!full)
		return ERR_PTR(-ENFILE);
	full->type = sock->type;
	full->ops = READ_ONCE(sock->ops);
	if (!try_module_get(full->ops->owner)) {
		sock_release(full);
		return ERR_PTR(-ENODEV);
	}
	file = sock_alloc_file(full, O_NONBLOCK | O_CLOEXEC, NULL);
	if (IS_ERR(file))
		return file;
	slow = lock_sock_fast(sk);
	full->state = sock->state;
	sock->sk = NULL;
	sock_graft(sk, full);
	unlock_sock_fast(sk, slow);
	module_put(sock->ops->owner);
	return file;
}

static void (*plain)(struct sock *sk);

static void ready(struct sock *sk)
{
	read_lock(&sk->sk_callback_lock);
	if (sk->sk_user_data)
		mp_handle_notify(sk->sk_user_data, EPOLLIN | EPOLLRDHUP);
	wake_up_interruptible_all(sk_sleep(sk));
	read_unlock(&sk->sk_callback_lock);
}

static bool watch(struct socket *sock, struct mp_handle *h)
{
	struct sock *sk = sock->sk;

	lock_sock(sk);
	write_lock_bh(&sk->sk_callback_lock);
	rcu_assign_sk_user_data(sk, h);
	plain = xchg(&sk->sk_data_ready, ready);
	write_unlock_bh(&sk->sk_callback_lock);
	release_sock(sk);
	return true;
}

static void unwatch(struct socket *sock)
{
	struct sock *sk = sock->sk;

	write_lock_bh(&sk->sk_callback_lock);
	sk->sk_user_data = NULL;
	WRITE_ONCE(sk->sk_data_ready, plain);
	write_unlock_bh(&sk->sk_callback_lock);
	synchronize_net();
}

const struct mp_lwsocket_ops mp_lightweight_ops = {
	enter, leave, alloc, release, accept, close, watch, unwatch, convert,
};
