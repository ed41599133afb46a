// SPDX-License-Identifier: GPL-2.0-only
/*
 * The limit: what an echo over TCP costs when no interface stands between the
 * connection and its server. It is what the servers of the bench are compared
 * with, so its design is fixed:
 *
 *  - It runs where the packet is processed, in the callbacks of the socket and
 *    under the socket's lock, which the softirq already holds: no task that is
 *    woken, no queue between the two, no system call.
 *  - A listener for each CPU (SO_REUSEPORT, SO_INCOMING_CPU): a connection is
 *    accepted where its handshake arrives, and stays there.
 *  - A connection is a struct sock and nothing else: no struct socket, file,
 *    inode, dentry or descriptor, nor any memory of this module.
 *  - The payload is copied once, out of the received packet into memory that
 *    the reply is sent from. A server has to do something with its data, so
 *    handing the received pages back untouched would be no server's limit; the
 *    others copy twice, to user space and back.
 *  - No memory cgroup is charged: there is no task whose memory it would be.
 *  - What TCP has reserved for a connection's packets, up to a page, it keeps:
 *    a packet for which nothing is reserved takes TCP's slow path. MegaPipe has
 *    the same for its lwsockets (sk_reserved_mem).
 *
 * What is left is TCP, IP, the driver and the interrupts, as configured for
 * everybody.
 *
 * Writing a port number to /dev/mp_limit starts the echo on it; closing the
 * file stops it and resets its connections.
 *
 * Locking: control_lock guards listeners[] and the right to use them. What
 * belongs to a connection is guarded by its socket's lock, as in TCP itself;
 * but see enum life.
 */
#include <linux/bvec.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/net.h>
#include <linux/percpu.h>
#include <linux/workqueue.h>
#include <net/inet_hashtables.h>
#include <net/sock.h>
#include <net/tcp.h>

#define BACKLOG 16384

static DEFINE_MUTEX(control_lock);
static struct file *user;		/* who has started it */
static struct socket **listeners;	/* by CPU, nr_cpu_ids of them */

/* What a socket's callbacks were before they were ours. */
static void (*plain_state_change)(struct sock *sk);
static void (*plain_data_ready)(struct sock *sk);
static void (*plain_write_space)(struct sock *sk);

/*
 * TCP notes a full send queue in sk_socket, and looks for sleepers in sk_wq:
 * all connections share this one. The note is never cleared, so that once one
 * of them had to wait, all are asked at each ACK.
 */
static struct socket nobody;

/* Used with softirqs off. */
struct sender {
	struct page_frag fragment;	/* what replies are sent from */
	struct sock *sock;		/* whose packets are being echoed, or NULL */
};
static DEFINE_PER_CPU(struct sender, senders);

/*
 * A connection can end before it has been taken out of its listener's queue:
 * when the packet that completes the handshake brings data and FIN with it.
 * Ending it is then left to whoever takes it out, who need not hold its lock
 * and so leaves it to work. sk_user_data says how far it is; it changes once,
 * by cmpxchg(), from NULL to TAKEN or ENDED.
 */
static long life[2];
#define TAKEN ((void *)&life[0])
#define ENDED ((void *)&life[1])

/* The list of these, linked by sk_user_data, ends with ENDED: NULL would look like new. */
static DEFINE_SPINLOCK(late_lock);	/* guards late and the links */
static void *late = ENDED;

/* Called with the socket's lock, in the state CLOSE_WAIT or CLOSE. */
static void end(struct sock *sk)
{
	/* tcp_shutdown(), which modules do not get by name: sends FIN, unless all is over. */
	sk->sk_prot->shutdown(sk, SEND_SHUTDOWN);
	WRITE_ONCE(sk->sk_state_change, plain_state_change);
	WRITE_ONCE(sk->sk_data_ready, plain_data_ready);
	WRITE_ONCE(sk->sk_write_space, plain_write_space);
	/* From here on it is TCP's, which frees it after the last ACK. */
	sock_orphan(sk);
	this_cpu_inc(*sk->sk_prot->orphan_count);
	if (sk->sk_state == TCP_CLOSE)
		inet_csk_destroy_sock(sk);
}

/* Send the bytes of @skb back; returns how many, or -EAGAIN. */
static int echo_packet(read_descriptor_t *desc, struct sk_buff *skb, unsigned int offset,
		       size_t length)
{
	struct page_frag *fragment = this_cpu_ptr(&senders.fragment);
	struct msghdr message = { .msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL | MSG_SPLICE_PAGES };
	struct sock *sk = desc->arg.data;
	struct bio_vec part;
	int ret;

	/* Without memory or room, the rest waits for the next ACK, or for the next packet. */
	if (!skb_page_frag_refill(32, fragment, GFP_ATOMIC))
		return -EAGAIN;
	length = min_t(size_t, length, fragment->size - fragment->offset);
	if (skb_copy_bits(skb, offset, page_address(fragment->page) + fragment->offset, length))
		return -EFAULT;
	bvec_set_page(&part, fragment->page, length, fragment->offset);
	iov_iter_bvec(&message.msg_iter, ITER_SOURCE, &part, 1, length);
	ret = tcp_sendmsg_locked(sk, &message, length);
	if (ret > 0)
		fragment->offset += ret;
	return ret;
}

/* Called with the socket's lock. */
static void echo(struct sock *sk)
{
	read_descriptor_t desc = { .arg.data = sk, .count = 1 };

	/* Sending asks for more to send; that is what we do already. */
	if (raw_cpu_read(senders.sock) == sk)
		return;
	/*
	 * At once, as the route demands (see init of the guest), and not with
	 * the reply: no server's data leaves before this packet does, and how
	 * many packets there are is not a matter of the interface.
	 */
	if (inet_csk_ack_scheduled(sk))
		__tcp_send_ack(sk, tcp_sk(sk)->rcv_nxt, 0);
	if (!sk->sk_socket) {
		RCU_INIT_POINTER(sk->sk_wq, &nobody.wq);
		sk_set_socket(sk, &nobody);
		WRITE_ONCE(sk->sk_reserved_mem, PAGE_SIZE);
	}
	/* In softirq, as a rule; but what came while a task had the lock is processed by it. */
	local_bh_disable();
	this_cpu_write(senders.sock, sk);
	tcp_read_sock(sk, &desc, echo_packet);
	this_cpu_write(senders.sock, NULL);
	local_bh_enable();
}

static void end_if_over(struct sock *sk)
{
	bool over = sk->sk_state == TCP_CLOSE ||
		    (sk->sk_state == TCP_CLOSE_WAIT && skb_queue_empty(&sk->sk_receive_queue));

	if (over && (READ_ONCE(sk->sk_user_data) == TAKEN ||
		     cmpxchg(&sk->sk_user_data, NULL, ENDED) == TAKEN))
		end(sk);
}

static void state_change(struct sock *sk)
{
	if (sk->sk_state == TCP_CLOSE_WAIT)
		echo(sk);
	end_if_over(sk);
}

static void write_space(struct sock *sk)
{
	if (skb_queue_empty(&sk->sk_receive_queue))
		return;
	echo(sk);
	end_if_over(sk);
}

static void end_late(struct work_struct *work)
{
	struct sock *sk;

	for (;;) {
		spin_lock_bh(&late_lock);
		sk = late == ENDED ? NULL : late;
		if (sk) {
			late = sk->sk_user_data;
			sk->sk_user_data = TAKEN;
		}
		spin_unlock_bh(&late_lock);
		if (!sk)
			return;
		lock_sock(sk);
		local_bh_disable();
		bh_lock_sock(sk);
		/* Or has it just been reset? */
		if (!sock_flag(sk, SOCK_DEAD))
			end(sk);
		bh_unlock_sock(sk);
		local_bh_enable();
		release_sock(sk);
		sock_put(sk);
	}
}
static DECLARE_WORK(end_late_work, end_late);

/* A connection of this listener is complete, and its lock may be held. */
static void take(struct sock *listener)
{
	struct request_sock *req;
	struct sock *sk;

	while ((req = reqsk_queue_remove(&inet_csk(listener)->icsk_accept_queue, listener))) {
		sk = req->sk;
		if (cmpxchg(&sk->sk_user_data, NULL, TAKEN)) {
			sock_hold(sk);
			spin_lock_bh(&late_lock);
			sk->sk_user_data = late;
			late = sk;
			spin_unlock_bh(&late_lock);
			schedule_work(&end_late_work);
		}
		reqsk_put(req);
	}
}

static void data_ready(struct sock *sk)
{
	if (sk->sk_state == TCP_LISTEN)
		take(sk);
	else
		echo(sk);
}

static int set_option(struct socket *sock, int name, int value)
{
	return sock_setsockopt(sock, SOL_SOCKET, name, KERNEL_SOCKPTR(&value), sizeof(value));
}

static struct socket *listen_on(u16 port, int cpu)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
	struct socket *sock;
	struct sock *sk;
	int ret;

	ret = sock_create_kern(&init_net, AF_INET, SOCK_STREAM, IPPROTO_TCP, &sock);
	if (ret)
		return ERR_PTR(ret);
	sk = sock->sk;
	tcp_sock_set_nodelay(sk);
	ret = set_option(sock, SO_REUSEADDR, 1) ?:
	      set_option(sock, SO_REUSEPORT, 1) ?:
	      set_option(sock, SO_INCOMING_CPU, cpu) ?:
	      kernel_bind(sock, (struct sockaddr *)&address, sizeof(address));
	if (ret)
		goto failed;
	/* All of this is inherited by the connections. */
	lock_sock(sk);
	sk->sk_allocation = GFP_ATOMIC;
	sk->sk_use_task_frag = false;
	plain_state_change = sk->sk_state_change;
	plain_data_ready = sk->sk_data_ready;
	plain_write_space = sk->sk_write_space;
	sk->sk_state_change = state_change;
	sk->sk_data_ready = data_ready;
	sk->sk_write_space = write_space;
	release_sock(sk);
	ret = kernel_listen(sock, BACKLOG);
	if (ret)
		goto failed;
	return sock;

failed:
	sock_release(sock);
	return ERR_PTR(ret);
}

/* Find a connection that still has our callbacks; returns a reference, or NULL. */
static struct sock *find_connection(void)
{
	struct inet_hashinfo *table = init_net.ipv4.tcp_death_row.hashinfo;
	struct hlist_nulls_node *node;
	struct sock *sk;
	unsigned int i;

	for (i = 0; i <= table->ehash_mask; i++) {
		spinlock_t *lock = inet_ehash_lockp(table, i);

		if (hlist_nulls_empty(&table->ehash[i].chain))
			continue;
		spin_lock_bh(lock);
		sk_nulls_for_each(sk, node, &table->ehash[i].chain) {
			if (sk_fullsock(sk) && READ_ONCE(sk->sk_data_ready) == data_ready &&
			    refcount_inc_not_zero(&sk->sk_refcnt)) {
				spin_unlock_bh(lock);
				return sk;
			}
		}
		spin_unlock_bh(lock);
		cond_resched();
	}
	return NULL;
}

static void stop(void)
{
	struct sock *sk;
	int cpu;

	for_each_possible_cpu(cpu)
		if (listeners[cpu])
			sock_release(listeners[cpu]);
	kfree(listeners);
	listeners = NULL;
	/* No packet is in take() any more: who is to be ended late is known. */
	synchronize_net();
	flush_work(&end_late_work);
	while ((sk = find_connection())) {
		tcp_abort(sk, ECONNABORTED);
		sock_put(sk);
	}
	/* Nor in any other function of this module. */
	synchronize_net();
}

static int start(u16 port)
{
	int cpu, ret = 0;

	listeners = kcalloc(nr_cpu_ids, sizeof(*listeners), GFP_KERNEL);
	if (!listeners)
		return -ENOMEM;
	for_each_online_cpu(cpu) {
		struct socket *sock = listen_on(port, cpu);

		if (IS_ERR(sock)) {
			ret = PTR_ERR(sock);
			break;
		}
		listeners[cpu] = sock;
	}
	if (ret)
		stop();
	return ret;
}

static ssize_t limit_write(struct file *file, const char __user *text, size_t count, loff_t *pos)
{
	u16 port;
	int ret;

	ret = kstrtou16_from_user(text, count, 10, &port);
	if (ret)
		return ret;
	if (!port)
		return -EINVAL;
	mutex_lock(&control_lock);
	if (user)
		ret = -EBUSY;
	else
		ret = start(port);
	if (!ret)
		user = file;
	mutex_unlock(&control_lock);
	return ret ?: count;
}

static int limit_release(struct inode *inode, struct file *file)
{
	mutex_lock(&control_lock);
	if (user == file) {
		stop();
		user = NULL;
	}
	mutex_unlock(&control_lock);
	return 0;
}

static const struct file_operations limit_fops = {
	.owner		= THIS_MODULE,
	.write		= limit_write,
	.release	= limit_release,
};

static struct miscdevice limit_device = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= "mp_limit",
	.mode	= 0600,
	.fops	= &limit_fops,
};

static int __init limit_init(void)
{
	init_waitqueue_head(&nobody.wq.wait);
	/* Nothing looks for an inode behind it. */
	nobody.flags = BIT(SOCK_NOINODE);
	return misc_register(&limit_device);
}

static void __exit limit_exit(void)
{
	int cpu;

	misc_deregister(&limit_device);
	for_each_possible_cpu(cpu) {
		struct page *page = per_cpu(senders, cpu).fragment.page;

		if (page)
			put_page(page);
	}
}

module_init(limit_init);
module_exit(limit_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("What an echo over TCP costs with no interface above it");
