// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe: the kinds of sockets. What they all do is in io.c.
 */
#include <linux/net.h>
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

/*
 * A descriptor may have come from another task, or outlive what its task may do,
 * so the security module is asked at each use. An lwsocket never leaves the
 * channel, whose owner was asked when it was accepted: it goes straight to TCP,
 * or to the layer that somebody has put on top.
 */
static ssize_t mp_lw_read(struct mp_handle *h)
{
	struct sock *sk = h->sock->sk;
	struct msghdr msg = {};
	int unused = 0;		/* length of the peer's address, which nobody wants */

	mp_read_iter(h, &msg.msg_iter);
	return READ_ONCE(sk->sk_prot)->recvmsg(sk, &msg, h->read_len, MSG_DONTWAIT, &unused);
}

static ssize_t mp_lw_write(struct mp_handle *h)
{
	struct sock *sk = h->sock->sk;
	struct msghdr msg = {
		.msg_iter = h->write.iter,
		.msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL,
	};

	return READ_ONCE(sk->sk_prot)->sendmsg(sk, &msg, iov_iter_count(&msg.msg_iter));
}

static ssize_t mp_tcp_read(struct mp_handle *h)
{
	struct sock *sk = h->sock->sk;

	/* A receive that finds nothing costs more than to look whether it would. */
	if (!mp_tcp_events(h, EPOLLIN))
		return -EAGAIN;
	if (mp_tcp_is_over(sk))
		return sock_error(sk) ?: -EAGAIN;
	return h->light ? mp_lw_read(h) : mp_socket_read(h);
}

static ssize_t mp_tcp_write(struct mp_handle *h)
{
	return h->light ? mp_lw_write(h) : mp_socket_write(h);
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
