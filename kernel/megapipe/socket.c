// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe: the operations on TCP sockets.
 *
 * Each is tried at once, in the context of the owner; what would block stays
 * pending on the handle and is tried again when the handle is ready.
 */
#include <linux/cpumask.h>
#include <linux/file.h>
#include <linux/net.h>
#include <linux/slab.h>
#include <linux/tcp.h>
#include <linux/uaccess.h>
#include <net/inet_connection_sock.h>

#include "batch.h"

static void mp_complete(struct mp_handle *h, const struct mp_completion *c)
{
	struct mp_completion full = *c;

	full.handle = h->number;
	full.cookie = h->cookie;
	mp_post(h->channel, &full);
}

static bool mp_is_tcp(const struct socket *sock)
{
	const struct sock *sk = sock->sk;

	return sk && sock->type == SOCK_STREAM && sk->sk_protocol == IPPROTO_TCP &&
	       (sk->sk_family == AF_INET || sk->sk_family == AF_INET6);
}

/* The CPU mask of a listener must be readable and name a CPU. */
static int mp_check_mask(const struct mp_request *req)
{
	cpumask_var_t mask;
	int ret = 0;

	if (!req->addr && !req->len)
		return 0;
	if (!req->len)
		return -EINVAL;
	if (!zalloc_cpumask_var(&mask, GFP_KERNEL_ACCOUNT))
		return -ENOMEM;
	if (copy_from_user(mask, u64_to_user_ptr(req->addr), min(req->len, cpumask_size())))
		ret = -EFAULT;
	else if (!cpumask_intersects(mask, cpu_possible_mask))
		ret = -EINVAL;
	free_cpumask_var(mask);
	return ret;
}

int mp_socket_register(struct mp_channel *ch, const struct mp_request *req)
{
	bool has_mask = req->addr || req->len;
	struct socket *sock;
	struct file *file;
	int ret;

	file = fget(req->fd);
	if (!file)
		return -EBADF;
	sock = sock_from_file(file);
	ret = -EOPNOTSUPP;
	if (!sock || !mp_is_tcp(sock))
		goto err;
	ret = -EINVAL;
	if (has_mask && inet_sk_state_load(sock->sk) != TCP_LISTEN)
		goto err;
	/* The plain way: a checked mask, and the shared listener all the same. */
	ret = mp_check_mask(req);
	if (ret)
		goto err;
	ret = mp_handle_add(ch, req->handle, file, req->cookie);
	if (ret)
		goto err;
	return 0;
err:
	fput(file);
	return ret;
}

/*
 * What poll() would say of @events, at a fraction of its cost. As with poll(),
 * nothing is lost if the caller has armed the handle before.
 */
__poll_t mp_socket_events(const struct mp_handle *h, __poll_t events)
{
	const struct sock *sk = h->sock->sk;
	__poll_t now = 0;

	/*
	 * Rare: writers, because asking makes the socket call back, and layers on
	 * top of TCP (TLS, BPF), which keep what they have to read elsewhere.
	 */
	if (events & EPOLLOUT || READ_ONCE(sk->sk_prot)->sock_is_readable) {
		now = vfs_poll(h->file, NULL) & (events | EPOLLHUP);
	} else if (h->accepts) {
		if (!reqsk_queue_empty(&inet_csk(sk)->icsk_accept_queue) ||
		    inet_sk_state_load(sk) != TCP_LISTEN)
			now |= EPOLLIN;
	} else if (!skb_queue_empty_lockless(&sk->sk_receive_queue) ||
		   READ_ONCE(sk->sk_shutdown) & RCV_SHUTDOWN ||
		   inet_sk_state_load(sk) == TCP_CLOSE) {
		now |= EPOLLIN;
	}
	/* Not what is on the error queue (time stamps, say): no operation takes it. */
	if (READ_ONCE(sk->sk_err))
		now |= EPOLLERR;
	return now;
}

/* --- accept ------------------------------------------------------------------ */

static int mp_accept_one(struct mp_handle *h)
{
	struct proto_accept_arg arg = { .flags = O_NONBLOCK };
	struct file *file;
	int fd;

	/* do_accept() would make a file first and then find nothing to accept. */
	if (!mp_socket_events(h, EPOLLIN))
		return -EAGAIN;
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0)
		return fd;
	file = do_accept(h->file, &arg, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (IS_ERR(file)) {
		put_unused_fd(fd);
		return PTR_ERR(file);
	}
	fd_install(fd, file);
	return fd;
}

/* Returns false if the ring has no room for what could be done. */
static bool mp_try_accept(struct mp_handle *h)
{
	struct sock *sk = h->sock->sk;

	while (h->accepts) {
		struct mp_completion c = { .op = MP_OP_ACCEPT };

		if (!mp_cq_room(h->channel))
			return false;
		c.result = mp_accept_one(h);
		if (c.result == -EAGAIN)
			return true;
		if (c.result < 0)
			h->accepts = 0;
		else if (--h->accepts)
			c.flags = MP_MORE;
		c.queued = READ_ONCE(sk->sk_ack_backlog);
		mp_complete(h, &c);
	}
	h->pending &= ~EPOLLIN;
	/*
	 * A wake-up for a connection wakes one channel. This one takes no more
	 * for now: hand the rest on.
	 */
	if (h->whead && !reqsk_queue_empty(&inet_csk(sk)->icsk_accept_queue))
		wake_up_interruptible_poll(h->whead, EPOLLIN | EPOLLRDNORM);
	return true;
}

int mp_socket_accept(struct mp_handle *h, const struct mp_request *req)
{
	if (inet_sk_state_load(h->sock->sk) != TCP_LISTEN || !req->len)
		return -EINVAL;
	if (h->pending & EPOLLIN)
		return -EBUSY;
	h->pending |= EPOLLIN;
	h->accepts = req->len;
	mp_socket_progress(h, EPOLLIN);
	return 0;
}

/* --- read -------------------------------------------------------------------- */

static bool mp_try_read(struct mp_handle *h)
{
	struct mp_completion c = { .op = MP_OP_READ };
	struct msghdr msg = { };

	if (!mp_cq_room(h->channel))
		return false;
	/* A receive that finds nothing costs more than to look whether it would. */
	if (!mp_socket_events(h, EPOLLIN))
		return true;
	c.result = import_ubuf(ITER_DEST, u64_to_user_ptr(h->read_addr), h->read_len,
			       &msg.msg_iter);
	if (!c.result)
		c.result = sock_recvmsg(h->sock, &msg, MSG_DONTWAIT);
	if (c.result == -EAGAIN)
		return true;
	h->pending &= ~EPOLLIN;
	mp_complete(h, &c);
	return true;
}

int mp_socket_read(struct mp_handle *h, const struct mp_request *req)
{
	u32 len = min_t(u32, req->len, MAX_RW_COUNT);

	/* Nothing read means end of file, so nothing must not be asked for. */
	if (!len || inet_sk_state_load(h->sock->sk) == TCP_LISTEN)
		return -EINVAL;
	if (h->pending & EPOLLIN)
		return -EBUSY;
	if (!access_ok(u64_to_user_ptr(req->addr), len))
		return -EFAULT;
	h->pending |= EPOLLIN;
	h->read_addr = req->addr;
	h->read_len = len;
	mp_socket_progress(h, EPOLLIN);
	return 0;
}

/* --- write ------------------------------------------------------------------- */

static bool mp_try_write(struct mp_handle *h)
{
	struct mp_write *w = &h->write;
	struct mp_completion c = { .op = w->op };
	int ret = 0;

	if (!mp_cq_room(h->channel))
		return false;
	while (iov_iter_count(&w->iter)) {
		struct msghdr msg = {
			.msg_iter = w->iter,
			.msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL,
		};

		ret = sock_sendmsg(h->sock, &msg);
		if (ret == -EAGAIN)
			return true;
		if (ret < 0)
			break;
		iov_iter_advance(&w->iter, ret);
		w->moved += ret;
	}
	c.result = w->moved;
	if (ret < 0 && w->moved)
		c.error = ret;
	else if (ret < 0)
		c.result = ret;
	mp_socket_forget(h);
	h->pending &= ~EPOLLOUT;
	mp_complete(h, &c);
	return true;
}

int mp_socket_write(struct mp_handle *h, const struct mp_request *req)
{
	struct mp_write *w = &h->write;
	void __user *addr = u64_to_user_ptr(req->addr);
	struct iovec *iov;
	int ret;

	if (inet_sk_state_load(h->sock->sk) == TCP_LISTEN)
		return -EINVAL;
	if (h->pending & EPOLLOUT)
		return -EBUSY;
	if (req->op == MP_OP_WRITE) {
		ret = import_ubuf(ITER_SOURCE, addr, req->len, &w->iter);
	} else {
		if (req->len > UIO_MAXIOV)
			return -EINVAL;
		/*
		 * Neither the stack's, because the write may outlive this call,
		 * nor import_iovec()'s own, which nobody is charged for.
		 */
		w->iov = kmalloc_array(max(req->len, 1U), sizeof(*iov), GFP_KERNEL_ACCOUNT);
		if (!w->iov)
			return -ENOMEM;
		iov = w->iov;
		ret = import_iovec(ITER_SOURCE, addr, req->len, req->len, &iov, &w->iter);
	}
	if (ret < 0) {
		mp_socket_forget(h);
		return ret;
	}
	w->op = req->op;
	w->moved = 0;
	h->pending |= EPOLLOUT;
	mp_socket_progress(h, EPOLLOUT);
	return 0;
}

/* Free what a pending operation holds. */
void mp_socket_forget(struct mp_handle *h)
{
	kfree(h->write.iov);
	h->write.iov = NULL;
}

int mp_socket_disconnect(struct mp_handle *h, const struct mp_request *req)
{
	struct mp_completion c = {
		.op = MP_OP_DISCONNECT,
		.result = __sys_shutdown_sock(h->sock, SHUT_RDWR),
	};

	mp_complete(h, &c);
	return 0;
}

/* Try what is pending, as far as @events concern it; wait for the rest. */
void mp_socket_progress(struct mp_handle *h, __poll_t events)
{
	bool room = true;

	if (events & (EPOLLERR | EPOLLHUP))
		events |= EPOLLIN | EPOLLOUT;
	if (events & EPOLLRDHUP)
		events |= EPOLLIN;
	if (h->pending & events & EPOLLIN)
		room &= h->accepts ? mp_try_accept(h) : mp_try_read(h);
	if (h->pending & events & EPOLLOUT)
		room &= mp_try_write(h);

	if (!room)
		mp_handle_make_ready(h, h->pending);
	else if (h->pending)
		mp_handle_wait(h, h->pending);
}
