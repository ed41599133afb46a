// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe: the operations, the same for every kind of file.
 *
 * Each is tried at once, in the context of the owner; what would block stays
 * pending on the handle and is tried again when the handle is ready.
 */
#include <linux/cpumask.h>
#include <linux/file.h>
#include <linux/mm.h>
#include <linux/net.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <net/inet_connection_sock.h>

#include "lwsocket.h"
#include "operation.h"
#include "partition.h"

static bool mp_socket_listens(const struct socket *sock)
{
	return READ_ONCE(sock->sk->sk_state) == TCP_LISTEN;
}

/* What listens has no bytes. An lwsocket is a connection. */
static bool mp_has_no_bytes(const struct mp_handle *h)
{
	return !h->light && h->sock && mp_socket_listens(h->sock);
}

/* There is something to free after writev only. */
static void mp_write_free(struct mp_write *w)
{
	if (unlikely(w->iov)) {
		kfree(w->iov);
		w->iov = NULL;
	}
}

/* --- what is not done yet ---------------------------------------------------------- */

/* It cannot be waited for: the operations end with the reason, as far as there is room. */
bool mp_give_up(struct mp_handle *h, int error)
{
	if (h->pending & EPOLLIN) {
		struct mp_completion c = {
			.op = h->accepts ? MP_OP_ACCEPT : MP_OP_READ,
			.result = error,
		};

		if (!mp_cq_room(h->channel))
			return false;
		h->accepts = 0;
		h->pending &= ~EPOLLIN;
		mp_complete(h, c);
	}
	if (h->pending & EPOLLOUT) {
		struct mp_completion c = {
			.op = h->write.op,
			.result = h->write.moved ?: error,
			.error = h->write.moved ? error : 0,
		};

		if (!mp_cq_room(h->channel))
			return false;
		mp_write_free(&h->write);
		h->pending &= ~EPOLLOUT;
		mp_complete(h, c);
	}
	return true;
}

/* --- lwsockets that are not registered yet ------------------------------------ */

/* Returns the index of a slot for one more, or a negative errno. */
static int mp_lw_slot_get(struct mp_channel *ch)
{
	struct mp_lw_slot *more;
	u32 i, slots;

	if (!mp_may_hold(ch))
		return -EMFILE;
	if (ch->lw_free == MP_NO_SLOT) {
		slots = max(64U, 2 * ch->nr_lw_slots);
		more = kvcalloc(slots, sizeof(*more), GFP_KERNEL_ACCOUNT);
		if (!more)
			return -ENOMEM;
		if (ch->nr_lw_slots)
			memcpy(more, ch->lw_slots, ch->nr_lw_slots * sizeof(*more));
		for (i = slots; i-- > ch->nr_lw_slots;) {
			more[i].next_free = ch->lw_free;
			ch->lw_free = i;
		}
		kvfree(ch->lw_slots);
		ch->lw_slots = more;
		ch->nr_lw_slots = slots;
	}
	i = ch->lw_free;
	ch->lw_free = ch->lw_slots[i].next_free;
	ch->nr_held++;
	return i;
}

static void mp_lw_slot_put(struct mp_channel *ch, u32 i)
{
	ch->lw_slots[i].sock = NULL;
	ch->lw_slots[i].next_free = ch->lw_free;
	ch->lw_free = i;
	ch->nr_held--;
}

/* Take the lwsocket with this number out of its slot; NULL: there is none. */
static struct socket *mp_lw_take(struct mp_channel *ch, s32 number)
{
	u32 i = number - MP_LWSOCKET_BASE;
	struct socket *sock;

	if (i >= ch->nr_lw_slots)
		return NULL;
	i = array_index_nospec(i, ch->nr_lw_slots);
	sock = ch->lw_slots[i].sock;
	if (sock)
		mp_lw_slot_put(ch, i);
	return sock;
}

/* Memory for a connection, or ERR_PTR(). */
static struct socket *mp_lw_get(struct mp_channel *ch)
{
	if (ch->nr_spare_lw)
		return ch->spare_lw[--ch->nr_spare_lw];
	return ch->lwsocket->alloc();
}

/* There is no connection in @lw any more. */
static void mp_lw_put(struct mp_channel *ch, struct socket *lw)
{
	if (ch->nr_spare_lw < MP_MAX_SPARE)
		ch->spare_lw[ch->nr_spare_lw++] = lw;
	else
		ch->lwsocket->free(lw);
}

void mp_lw_close(struct mp_channel *ch, struct socket *lw)
{
	if (ch->nr_charges < MP_MAX_SPARE)
		ch->nr_charges += inet_csk_keep_charge(lw->sk, &ch->charges[ch->nr_charges]);
	ch->lwsocket->close(lw);
	mp_lw_put(ch, lw);
}

/* After the handles have gone. */
void mp_lw_drop_all(struct mp_channel *ch)
{
	u32 i;

	for (i = 0; i < ch->nr_lw_slots; i++) {
		if (ch->lw_slots[i].sock)
			mp_lw_close(ch, ch->lw_slots[i].sock);
		cond_resched();
	}
	kvfree(ch->lw_slots);
	while (ch->nr_spare_lw)
		ch->lwsocket->free(ch->spare_lw[--ch->nr_spare_lw]);
	while (ch->nr_charges)
		inet_csk_drop_charge(&ch->charges[--ch->nr_charges]);
}

int mp_drop(struct mp_channel *ch, const struct mp_request *req)
{
	struct socket *sock;

	if (req->handle || req->cookie || req->addr || req->len || req->flags)
		return -EINVAL;
	sock = req->fd >= MP_LWSOCKET_BASE ? mp_lw_take(ch, req->fd) : NULL;
	if (!sock)
		return -EBADF;
	mp_lw_close(ch, sock);
	return 0;
}

/* --- register ------------------------------------------------------------------- */

static int mp_register_light(struct mp_channel *ch, const struct mp_request *req)
{
	struct socket *sock;
	struct mp_handle *h;
	u32 slot = req->fd - MP_LWSOCKET_BASE;

	if (req->addr || req->len)
		return -EINVAL;
	sock = mp_lw_take(ch, req->fd);
	if (!sock)
		return -EBADF;
	h = mp_handle_add(ch, req->handle, req->cookie);
	if (IS_ERR(h)) {
		/* As it was: the number stays valid. */
		ch->lw_free = ch->lw_slots[slot].next_free;
		ch->lw_slots[slot].sock = sock;
		ch->nr_held++;
		return PTR_ERR(h);
	}
	h->light = true;
	h->sock = sock;
	h->kind = &mp_tcp_kind;
	return 0;
}

/* Copy the CPU mask of a listener, without CPUs that there cannot be. */
static int mp_copy_mask(struct cpumask *mask, const struct mp_request *req)
{
	if (!req->len)
		return -EINVAL;
	if (copy_from_user(mask, u64_to_user_ptr(req->addr), min(req->len, cpumask_size())))
		return -EFAULT;
	if (!cpumask_and(mask, mask, cpu_possible_mask))
		return -EINVAL;
	return 0;
}

/* Returns the file to accept from. */
static struct file *mp_open_part(struct mp_channel *ch, struct file *listener,
				 const struct mp_request *req)
{
	struct file *part;
	cpumask_var_t mask;
	int ret;

	if (!zalloc_cpumask_var(&mask, GFP_KERNEL_ACCOUNT))
		return ERR_PTR(-ENOMEM);
	ret = mp_copy_mask(mask, req);
	part = ret ? ERR_PTR(ret) : ch->partition->open(listener, mask);
	free_cpumask_var(mask);
	return part;
}

static int mp_register_file(struct mp_channel *ch, const struct mp_request *req,
			    struct file *file)
{
	struct socket *sock = sock_from_file(file);
	const struct mp_kind *kind = sock ? mp_socket_kind(sock) : mp_file_kind(file);
	bool has_mask = req->addr || req->len;
	struct mp_handle *h;
	struct file *part;

	if (!kind)
		return -EOPNOTSUPP;
	if (has_mask && (kind != &mp_tcp_kind || !mp_socket_listens(sock)))
		return -EINVAL;
	h = mp_handle_add(ch, req->handle, req->cookie);
	if (IS_ERR(h))
		return PTR_ERR(h);
	h->kind = kind;
	if (has_mask) {
		part = mp_open_part(ch, file, req);
		if (IS_ERR(part)) {
			mp_handle_remove(h);
			return PTR_ERR(part);
		}
		h->listener = file;
		h->file = part;
		h->sock = sock_from_file(part);
	} else {
		h->file = file;
		h->sock = sock;
	}
	h->pos = file->f_pos;
	h->listens = sock && mp_socket_listens(sock);
	return 0;
}

int mp_register(struct mp_channel *ch, const struct mp_request *req)
{
	struct file *file;
	int ret;

	if (req->flags)
		return -EINVAL;
	if (req->fd >= MP_LWSOCKET_BASE)
		return mp_register_light(ch, req);
	file = fget(req->fd);
	if (!file)
		return -EBADF;
	ret = mp_register_file(ch, req, file);
	if (ret)
		fput(file);
	return ret;
}

/* --- accept ------------------------------------------------------------------ */

static int mp_accept_fd(struct mp_handle *h)
{
	struct proto_accept_arg arg = { .flags = O_NONBLOCK };
	struct file *file;
	int fd;

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

/*
 * What has been charged to the memory cgroup for the packets of a connection stays
 * charged until it ends, up to @bytes. Otherwise each packet is charged when it comes,
 * and given back when it goes.
 */
static void mp_lw_keep_charged(struct sock *sk, u32 bytes)
{
	WRITE_ONCE(sk->sk_reserved_mem, bytes);
}

static int mp_accept_light(struct mp_handle *h)
{
	struct mp_channel *ch = h->channel;
	struct socket *lw;
	int slot, ret;

	slot = mp_lw_slot_get(ch);
	if (slot < 0)
		return slot;
	lw = mp_lw_get(ch);
	if (IS_ERR(lw)) {
		mp_lw_slot_put(ch, slot);
		return PTR_ERR(lw);
	}
	ret = ch->lwsocket->accept(h->sock, lw);
	if (ret) {
		mp_lw_put(ch, lw);
		mp_lw_slot_put(ch, slot);
		return ret;
	}
	inet_csk_charge(lw->sk, ch->nr_charges ? &ch->charges[--ch->nr_charges] : NULL);
	mp_lw_keep_charged(lw->sk, PAGE_SIZE);
	ch->lw_slots[slot].sock = lw;
	return MP_LWSOCKET_BASE + slot;
}

/* Is there a connection in the queue? */
static bool mp_accept_has_more(const struct mp_handle *h)
{
	if (h->kind != &mp_tcp_kind)
		return h->kind->events(h, EPOLLIN);
	return !reqsk_queue_empty(&inet_csk(h->sock->sk)->icsk_accept_queue);
}

static int mp_accept_one(struct mp_handle *h)
{
	int ret = -EOPNOTSUPP;

	/* do_accept() would make a file first and then find nothing, not even an error. */
	if (!mp_accept_has_more(h) && !h->kind->events(h, EPOLLIN))
		return -EAGAIN;
	if (h->accept_light)
		ret = mp_accept_light(h);
	return ret == -EOPNOTSUPP ? mp_accept_fd(h) : ret;
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
		if (h->kind == &mp_tcp_kind)
			c.queued = READ_ONCE(sk->sk_ack_backlog);
		mp_complete(h, c);
	}
	h->pending &= ~EPOLLIN;
	/*
	 * A wake-up for a connection wakes one channel. This one takes no more
	 * for now: hand the rest on.
	 */
	if (h->wait.head && mp_accept_has_more(h))
		wake_up_interruptible_poll(&h->sock->wq.wait, EPOLLIN | EPOLLRDNORM);
	return true;
}

int mp_accept(struct mp_handle *h, const struct mp_request *req)
{
	if (!h->sock || !h->sock->sk || !mp_socket_listens(h->sock) || !req->len)
		return -EINVAL;
	if (h->pending & EPOLLIN)
		return -EBUSY;
	h->pending |= EPOLLIN;
	h->accepts = req->len;
	h->accept_light = req->flags & MP_ACCEPT_LWSOCKET && h->channel->lwsocket &&
			  h->kind == &mp_tcp_kind;
	mp_settle(h, mp_try_accept(h));
	return 0;
}

/* --- read -------------------------------------------------------------------- */

static bool mp_try_read(struct mp_handle *h)
{
	ssize_t ret;

	if (!mp_cq_room(h->channel))
		return false;
	ret = h->kind->read(h);
	if (ret != -EAGAIN && ret != -EIOCBQUEUED)
		mp_read_done(h, ret);
	return true;
}

/* Where a request starts, or -1: at the handle's own position. */
static int mp_request_pos(const struct mp_handle *h, const struct mp_request *req, loff_t *pos)
{
	*pos = -1;
	if (!(req->flags & MP_AT_OFFSET))
		return 0;
	if (!h->kind->offloads)
		return -ESPIPE;
	if ((loff_t)req->cookie < 0)
		return -EINVAL;
	*pos = req->cookie;
	return 0;
}

int mp_read(struct mp_handle *h, const struct mp_request *req)
{
	u32 len = min_t(u32, req->len, MAX_RW_COUNT);
	loff_t pos = -1;
	int ret;

	/* Nothing read means end of file, so nothing must not be asked for. */
	if (!len || mp_has_no_bytes(h))
		return -EINVAL;
	ret = mp_request_pos(h, req, &pos);
	if (ret)
		return ret;
	if (h->pending & EPOLLIN)
		return -EBUSY;
	if (!access_ok(u64_to_user_ptr(req->addr), len))
		return -EFAULT;
	h->pending |= EPOLLIN;
	h->read_addr = req->addr;
	h->read_len = len;
	h->read_moved = 0;
	h->read_pos = pos;
	mp_settle(h, mp_try_read(h));
	return 0;
}

/* --- write ------------------------------------------------------------------- */

static bool mp_try_write(struct mp_handle *h)
{
	struct mp_write *w = &h->write;
	struct mp_completion c = { .op = w->op };
	ssize_t ret = 0;

	if (!mp_cq_room(h->channel))
		return false;
	while (iov_iter_count(&w->iter) || !h->kind->whole) {
		ret = h->kind->write(h);
		if (ret == -EAGAIN || ret == -EIOCBQUEUED)
			return true;
		if (ret < 0)
			break;
		w->moved += ret;
		/* All of it, as a rule, or nothing more will go. */
		if (ret == iov_iter_count(&w->iter) || !ret || !h->kind->whole)
			break;
		iov_iter_advance(&w->iter, ret);
	}
	c.result = w->moved;
	if (ret < 0 && w->moved)
		c.error = ret;
	else if (ret < 0)
		c.result = ret;
	mp_write_free(w);
	h->pending &= ~EPOLLOUT;
	mp_complete(h, c);
	return true;
}

/* Copy the list of buffers; 0 or a negative errno. */
static int mp_import_vector(struct mp_write *w, const struct mp_request *req)
{
	struct iovec *iov;
	ssize_t ret;

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
	ret = import_iovec(ITER_SOURCE, u64_to_user_ptr(req->addr), req->len, req->len, &iov,
			   &w->iter);
	if (ret < 0)
		mp_write_free(w);
	return min(ret, 0);
}

/* @moved bytes have gone already. */
int mp_write_rest(struct mp_handle *h, const struct mp_request *req, u32 moved)
{
	struct mp_write *w = &h->write;
	u32 len = min_t(u32, req->len, MAX_RW_COUNT);
	loff_t pos;
	int ret;

	if (mp_has_no_bytes(h))
		return -EINVAL;
	ret = mp_request_pos(h, req, &pos);
	if (ret)
		return ret;
	if (h->pending & EPOLLOUT)
		return -EBUSY;
	if (req->op == MP_OP_WRITE) {
		if (!access_ok(u64_to_user_ptr(req->addr), len))
			return -EFAULT;
		iov_iter_ubuf(&w->iter, ITER_SOURCE, u64_to_user_ptr(req->addr + moved),
			      len - moved);
	} else {
		ret = mp_import_vector(w, req);
		if (ret)
			return ret;
	}
	w->op = req->op;
	w->moved = moved;
	h->write_pos = pos;
	h->pending |= EPOLLOUT;
	mp_settle(h, mp_try_write(h));
	return 0;
}

int mp_write(struct mp_handle *h, const struct mp_request *req)
{
	return mp_write_rest(h, req, 0);
}

/* --- disconnect, convert --------------------------------------------------------- */

int mp_disconnect(struct mp_handle *h, const struct mp_request *req)
{
	struct mp_completion c = { .op = MP_OP_DISCONNECT };

	if (!h->sock)
		return -ENOTSOCK;
	c.result = __sys_shutdown_sock(h->sock, SHUT_RDWR);
	mp_complete(h, c);
	return 0;
}

int mp_convert(struct mp_handle *h, const struct mp_request *req)
{
	struct mp_completion c = { .op = MP_OP_CONVERT };
	struct socket *lw = h->sock;
	struct file *file;
	int fd;

	if (!h->light)
		return -EINVAL;
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0)
		return fd;
	/* Its wait queue goes; what is pending is waited for in the new one. */
	mp_handle_unwait(h);
	file = h->channel->lwsocket->convert(lw);
	if (IS_ERR(file)) {
		put_unused_fd(fd);
		c.result = PTR_ERR(file);
	} else {
		mp_lw_put(h->channel, lw);
		h->light = false;
		h->file = file;
		h->sock = sock_from_file(file);
		/* As any other from here on. */
		mp_lw_keep_charged(h->sock->sk, 0);
		fd_install(fd, get_file(file));
		c.result = fd;
	}
	mp_complete(h, c);
	if (h->pending)
		mp_handle_make_ready(h, h->pending);
	return 0;
}

/* --- going on ----------------------------------------------------------------------- */

/* The handle is off the list, and in no batch. */
void mp_run_any(struct mp_handle *h)
{
	__poll_t events;
	bool room = true;

	/* Disarmed, off the list: the callback leaves @events alone. */
	events = h->events;
	h->events = 0;
	/* Try what is pending, as far as they concern it; wait for the rest. */
	if (events & (EPOLLERR | EPOLLHUP))
		events |= EPOLLIN | EPOLLOUT;
	if (events & EPOLLRDHUP)
		events |= EPOLLIN;
	if (h->pending & events & EPOLLIN)
		room &= h->accepts ? mp_try_accept(h) : mp_try_read(h);
	if (h->pending & events & EPOLLOUT)
		room &= mp_try_write(h);
	mp_settle(h, room);
}

/* Free what pending operations hold; a job goes on without the handle. */
void mp_forget(struct mp_handle *h)
{
	if (h->read_job)
		mp_job_forget(&h->read_job, NULL);
	if (h->write_job) {
		mp_job_forget(&h->write_job, h->write.iov);
		h->write.iov = NULL;
	}
	mp_write_free(&h->write);
}
