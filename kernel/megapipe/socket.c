// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe: the kinds of sockets. What they all do is in io.c.
 */
#include <linux/indirect_call_wrapper.h>
#include <linux/instrumented.h>
#include <linux/net.h>
#include <linux/uaccess.h>
#include <linux/un.h>
#include <net/inet_connection_sock.h>
#include <net/tcp.h>

#include "batch.h"
#include "tcp.h"

static bool mp_socket_is_tcp(const struct socket *sock)
{
	const struct sock *sk = sock->sk;

	return sk->sk_type == SOCK_STREAM && sk->sk_protocol == IPPROTO_TCP &&
	       (sk->sk_family == AF_INET || sk->sk_family == AF_INET6);
}

/* What poll() says, less what no operation takes. An lwsocket has no file. */
static __poll_t mp_socket_poll(const struct mp_handle *h, __poll_t events)
{
	__poll_t now = h->sock->ops->poll(h->file, h->sock, NULL);

	/* What is on the error queue (time stamps, say) is not for an operation. */
	if (!READ_ONCE(h->sock->sk->sk_err))
		now &= ~EPOLLERR;
	return now & (events | EPOLLERR | EPOLLHUP);
}

static __poll_t mp_tcp_events(const struct mp_handle *h, __poll_t events)
{
	const struct sock *sk = h->sock->sk;
	__poll_t now = 0;

	/* Rare: writers, because asking makes the socket call back. */
	if (events & EPOLLOUT || mp_tcp_is_layered(sk))
		return mp_socket_poll(h, events);
	if (!h->accepts)
		return mp_tcp_input(sk);
	if (!reqsk_queue_empty(&inet_csk(sk)->icsk_accept_queue) ||
	    inet_sk_state_load(sk) != TCP_LISTEN)
		now |= EPOLLIN;
	if (READ_ONCE(sk->sk_err))
		now |= EPOLLERR;
	return now;
}

static ssize_t mp_socket_read(struct mp_handle *h)
{
	struct msghdr msg = {};

	mp_read_iter(h, &msg.msg_iter);
	return sock_recvmsg(h->sock, &msg, MSG_DONTWAIT);
}

static ssize_t mp_socket_write(struct mp_handle *h)
{
	struct msghdr msg = {
		.msg_iter = h->write.iter,
		.msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL,
	};

	return sock_sendmsg(h->sock, &msg);
}

/* All over: nothing can arrive any more, and what is left is to say why. */
static __always_inline bool mp_tcp_is_over(const struct sock *sk)
{
	return unlikely(inet_sk_state_load(sk) == TCP_CLOSE) && READ_ONCE(sk->sk_err) &&
	       skb_queue_empty_lockless(&sk->sk_receive_queue) && !mp_tcp_is_layered(sk);
}

static ssize_t mp_tcp_read(struct mp_handle *h)
{
	struct sock *sk = h->sock->sk;

	/* A receive that finds nothing costs more than to look whether it would. */
	if (!mp_tcp_events(h, EPOLLIN))
		return -EAGAIN;
	if (mp_tcp_is_over(sk))
		return sock_error(sk) ?: -EAGAIN;
	return mp_socket_read(h);
}

/*
 * A descriptor may have come from another task, or outlive what its task may do,
 * so the security module is asked at each use. An lwsocket never leaves the
 * channel, whose owner was asked when it was accepted: it goes straight to TCP.
 *
 * What is short is moved under the spin lock of the socket, as TCP itself works
 * in softirq: a whole socket lock costs more than the bytes. Nothing can sleep
 * there; what would have to (a buffer that is not in memory, no memory left, a
 * memory cgroup that may have to be shrunk) and what is not short takes the
 * ordinary way.
 */
#define MP_SHORT	256	/* bytes; softirqs are off while they are copied */

/* As much must have been charged for the socket already: a packet with MP_SHORT bytes. */
#define MP_SHORT_CHARGED	2048

/* Take the spin lock of @sk, or return false: a task (ss -K, say) has locked the socket. */
static __always_inline bool mp_short_lock(struct sock *sk)
{
	spin_lock_bh(&sk->sk_lock.slock);
	if (likely(!sock_owned_by_user(sk)))
		return true;
	spin_unlock_bh(&sk->sk_lock.slock);
	return false;
}

static __always_inline void mp_short_unlock(struct sock *sk)
{
	spin_unlock_bh(&sk->sk_lock.slock);
}

/* Where @len bytes of the packet lie in one piece, or NULL: they do not, or nobody can tell. */
static __always_inline const void *mp_bytes_at(const struct sk_buff *skb, unsigned int offset,
					       size_t len)
{
	const skb_frag_t *first = skb_shinfo(skb)->frags;
	unsigned int linear = skb_headlen(skb);
	const void *bytes;

	if (offset + len <= linear)
		return skb->data + offset;
	if (offset < linear || !skb_shinfo(skb)->nr_frags || !skb_frags_readable(skb) ||
	    offset - linear + len > skb_frag_size(first))
		return NULL;
	bytes = skb_frag_address_safe(first);
	return bytes ? bytes + (offset - linear) : NULL;
}

/* Called by tcp_read_sock(): copy to the user; returns how many bytes, or -EAGAIN. */
static int mp_short_copy(read_descriptor_t *desc, struct sk_buff *skb, unsigned int offset,
			 size_t len)
{
	char __user *to = desc->arg.buf;
	const void *from;

	len = min(len, desc->count);
	if (!len)
		return 0;
	from = mp_bytes_at(skb, offset, len);
	if (!from)
		return -EAGAIN;
	/* mp_read() has looked at the address. What came before a fault is copied again. */
	instrument_copy_to_user(to, from, len);
	if (raw_copy_to_user(to, from, len))
		return -EAGAIN;
	desc->arg.buf += len;
	desc->count -= len;
	return len;
}

/* Returns how many bytes, or something else: take the ordinary way. */
static __always_inline int mp_short_read(struct mp_handle *h)
{
	struct sock *sk = h->sock->sk;
	read_descriptor_t desc = { .arg.buf = u64_to_user_ptr(h->read_addr) };
	int ret = -EAGAIN;
	u32 there;

	if (!mp_short_lock(sk))
		return ret;
	/* The end of the stream is in it, too, and counts as a byte. */
	there = tcp_sk(sk)->rcv_nxt - tcp_sk(sk)->copied_seq;
	/* Under the lock nobody puts a layer on top. */
	if (likely(there <= MP_SHORT && !mp_tcp_is_layered(sk))) {
		/* It need not look for more than there is. */
		desc.count = min(h->read_len, there);
		pagefault_disable();
		ret = tcp_read_sock(sk, &desc, mp_short_copy);
		pagefault_enable();
		if (likely(ret > 0))
			sk_peek_offset_bwd(sk, ret);
	}
	mp_short_unlock(sk);
	return ret;
}

static noinline ssize_t mp_ordinary_read(struct mp_handle *h)
{
	struct sock *sk = h->sock->sk;
	struct msghdr msg = {};
	int unused = 0;		/* length of the peer's address, which nobody wants */

	mp_read_iter(h, &msg.msg_iter);
	return READ_ONCE(sk->sk_prot)->recvmsg(sk, &msg, h->read_len, MSG_DONTWAIT, &unused);
}

/* Nobody else reads from an lwsocket, so that there is something, or nobody would ask. */
ssize_t mp_lw_read(struct mp_handle *h)
{
	struct sock *sk = h->sock->sk;
	int ret;

	if (skb_queue_empty_lockless(&sk->sk_receive_queue)) {
		if (mp_tcp_is_over(sk))
			return sock_error(sk) ?: -EAGAIN;
	} else {
		ret = mp_short_read(h);
		if (likely(ret > 0))
			return ret;
	}
	return mp_ordinary_read(h);
}

/* Returns how many bytes, or an errno; -EAGAIN, -EFAULT: take the ordinary way. */
static __always_inline int mp_short_write(struct sock *sk, struct msghdr *msg, u32 len)
{
	gfp_t allocation;
	int ret = -EAGAIN;
	int sndbuf;

	if (len > MP_SHORT || !mp_short_lock(sk))
		return ret;
	if (likely(sk->sk_prot->sendmsg == tcp_sendmsg &&
		   sk->sk_forward_alloc >= MP_SHORT_CHARGED)) {
		/* Read and written under the socket's lock only. */
		allocation = sk->sk_allocation;
		sk->sk_allocation = GFP_ATOMIC | __GFP_NOWARN;
		sndbuf = sk->sk_sndbuf;
		pagefault_disable();
		ret = tcp_sendmsg_locked(sk, msg, len);
		pagefault_enable();
		sk->sk_allocation = allocation;
		/* What had no memory has shrunk it: the ordinary way, which may wait, decides. */
		if (unlikely(ret < 0))
			WRITE_ONCE(sk->sk_sndbuf, sndbuf);
	}
	mp_short_unlock(sk);
	return ret;
}

/* Not by way of the pointer, as long as nobody has put a layer on top. */
static __always_inline ssize_t mp_lw_send(struct sock *sk, struct msghdr *msg)
{
	return INDIRECT_CALL_1(READ_ONCE(sk->sk_prot)->sendmsg, tcp_sendmsg,
			       sk, msg, iov_iter_count(&msg->msg_iter));
}

/* Write @len bytes from @addr, at which the caller has looked: how many have gone, or an errno. */
ssize_t mp_lw_write(struct mp_handle *h, u64 addr, u32 len)
{
	struct msghdr *msg = &h->channel->write_msg;
	struct sock *sk = h->sock->sk;
	int ret;

	msg->msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL;
	iov_iter_ubuf(&msg->msg_iter, ITER_SOURCE, u64_to_user_ptr(addr), len);
	ret = mp_short_write(sk, msg, len);
	if (unlikely(ret == -EAGAIN || ret == -EFAULT))
		return mp_lw_send(sk, msg);
	/* Any other error is told once, by whoever finds it first. */
	return ret;
}

static ssize_t mp_tcp_write(struct mp_handle *h)
{
	struct msghdr msg = {
		.msg_iter = h->write.iter,
		.msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL,
	};

	return h->light ? mp_lw_send(h->sock->sk, &msg) : mp_socket_write(h);
}

const struct mp_kind mp_tcp_kind = {
	.events	= mp_tcp_events,
	.read	= mp_tcp_read,
	.write	= mp_tcp_write,
	.whole	= true,
};

static const struct mp_kind mp_stream_kind = {
	.events	= mp_socket_poll,
	.read	= mp_socket_read,
	.write	= mp_socket_write,
	.whole	= true,
};

/* One request, one message: UDP, UNIX datagrams and sequenced packets. */
static const struct mp_kind mp_message_kind = {
	.events	= mp_socket_poll,
	.read	= mp_socket_read,
	.write	= mp_socket_write,
};

/* NULL: not a kind of socket that a channel takes. */
const struct mp_kind *mp_socket_kind(const struct socket *sock)
{
	const struct sock *sk = sock->sk;

	if (!sk)
		return NULL;
	if (mp_socket_is_tcp(sock))
		return &mp_tcp_kind;
	if (sk->sk_family == AF_UNIX)
		return sk->sk_type == SOCK_STREAM ? &mp_stream_kind : &mp_message_kind;
	if ((sk->sk_family == AF_INET || sk->sk_family == AF_INET6) &&
	    sk->sk_type == SOCK_DGRAM && sk->sk_protocol == IPPROTO_UDP)
		return &mp_message_kind;
	return NULL;
}
