// SPDX-License-Identifier: GPL-2.0-only
/*
 * MegaPipe: the kinds of files that are no sockets.
 *
 * What can be polled (pipes, FIFOs, eventfd, timerfd, signalfd, terminals) is
 * tried without blocking and waited for like a socket. What has a position
 * (regular files, block devices) is read at once if it is in memory; the rest
 * is done by jobs.
 */
#include <linux/fs.h>
#include <linux/poll.h>

#include "batch.h"

/* --- what can be polled -------------------------------------------------------- */

static __poll_t mp_pollable_events(const struct mp_handle *h, __poll_t events)
{
	return vfs_poll(h->file, NULL) & (events | EPOLLERR | EPOLLHUP);
}

/* Does @file know IOCB_NOWAIT? A FIFO does, though only pipe() says so. */
static bool mp_file_knows_nowait(const struct file *file)
{
	return file->f_mode & FMODE_NOWAIT || S_ISFIFO(file_inode(file)->i_mode);
}

/* Will an operation on @file return -EAGAIN instead of waiting? */
static bool mp_file_never_blocks(const struct file *file, bool by_iter)
{
	return file->f_flags & O_NONBLOCK || (by_iter && mp_file_knows_nowait(file));
}

static void mp_init_kiocb(struct kiocb *kiocb, struct file *file)
{
	init_sync_kiocb(kiocb, file);
	if (mp_file_knows_nowait(file))
		kiocb->ki_flags |= IOCB_NOWAIT;
}

static ssize_t mp_pollable_read(struct mp_handle *h)
{
	struct file *file = h->file;
	bool by_iter = file->f_op->read_iter;
	struct iov_iter to;
	struct kiocb kiocb;
	loff_t pos = 0;

	if (!(file->f_mode & FMODE_READ))
		return -EBADF;
	if (!(file->f_mode & FMODE_CAN_READ))
		return -EINVAL;
	if (!mp_file_never_blocks(file, by_iter))
		return -EOPNOTSUPP;
	if (!by_iter)
		return vfs_read(file, u64_to_user_ptr(h->read_addr), h->read_len, &pos);
	mp_read_iter(h, &to);
	mp_init_kiocb(&kiocb, file);
	return vfs_iocb_iter_read(file, &kiocb, &to);
}

static ssize_t mp_pollable_write(struct mp_handle *h)
{
	struct file *file = h->file;
	bool by_iter = file->f_op->write_iter;
	struct iov_iter from = h->write.iter;
	struct kiocb kiocb;
	loff_t pos = 0;

	if (!(file->f_mode & FMODE_WRITE))
		return -EBADF;
	if (!(file->f_mode & FMODE_CAN_WRITE))
		return -EINVAL;
	if (!mp_file_never_blocks(file, by_iter))
		return -EOPNOTSUPP;
	/* A pipe that nobody reads: the errno, without the signal. */
	if (vfs_poll(file, NULL) & EPOLLERR)
		return -EPIPE;
	if (!by_iter)
		return vfs_write(file, iter_iov_addr(&from), iter_iov_len(&from), &pos);
	mp_init_kiocb(&kiocb, file);
	return vfs_iocb_iter_write(file, &kiocb, &from);
}

static const struct mp_kind mp_pollable_kind = {
	.events	= mp_pollable_events,
	.read	= mp_pollable_read,
	.write	= mp_pollable_write,
	.whole	= true,
};

/* --- what has a position ------------------------------------------------------- */

/* Only a job has to be waited for, and it says so itself. */
static __poll_t mp_regular_events(const struct mp_handle *h, __poll_t events)
{
	__poll_t now = 0;

	if (h->read_job && mp_job_done(h->read_job))
		now |= EPOLLIN;
	if (h->write_job && mp_job_done(h->write_job))
		now |= EPOLLOUT;
	return now & events;
}

static ssize_t mp_regular_read(struct mp_handle *h)
{
	struct file *file = h->file;
	loff_t *pos = h->read_pos >= 0 ? &h->read_pos : &h->pos;
	ssize_t ret = -EAGAIN;
	struct iov_iter to;
	struct kiocb kiocb;

	if (!(file->f_mode & FMODE_READ))
		return -EBADF;
	if (h->read_job) {
		if (!mp_job_done(h->read_job))
			return -EIOCBQUEUED;
		ret = mp_job_take(&h->read_job, pos);
		/* What had been in memory counts, too. */
		return h->read_moved ? h->read_moved + max(ret, 0) : ret;
	}
	mp_read_iter(h, &to);
	if (file->f_mode & FMODE_NOWAIT) {
		mp_init_kiocb(&kiocb, file);
		kiocb.ki_pos = *pos;
		ret = vfs_iocb_iter_read(file, &kiocb, &to);
		if (ret >= 0) {
			*pos = kiocb.ki_pos;
			h->read_moved = ret;
			/* All of it, or the end of the file: no less would do for read(). */
			if (!iov_iter_count(&to) || !ret ||
			    *pos >= i_size_read(file->f_mapping->host))
				return ret;
		} else if (ret != -EAGAIN && ret != -EOPNOTSUPP) {
			return ret;
		}
	}
	ret = mp_job_start(h, &to, *pos, false);
	if (ret)
		return h->read_moved ?: ret;
	return -EIOCBQUEUED;
}

static ssize_t mp_regular_write(struct mp_handle *h)
{
	loff_t *pos = h->write_pos >= 0 ? &h->write_pos : &h->pos;
	struct iov_iter from = h->write.iter;
	int ret;

	if (!(h->file->f_mode & FMODE_WRITE))
		return -EBADF;
	if (h->write_job) {
		if (!mp_job_done(h->write_job))
			return -EIOCBQUEUED;
		return mp_job_take(&h->write_job, pos);
	}
	/* File systems take locks and reserve space: none promises not to wait. */
	ret = mp_job_start(h, &from, *pos, true);
	return ret ?: -EIOCBQUEUED;
}

static const struct mp_kind mp_regular_kind = {
	.events		= mp_regular_events,
	.read		= mp_regular_read,
	.write		= mp_regular_write,
	.whole		= true,
	.offloads	= true,
};

/* NULL: not a kind of file that a channel takes. */
const struct mp_kind *mp_file_kind(const struct file *file)
{
	umode_t mode = file_inode(file)->i_mode;

	if (file->f_mode & FMODE_PATH)
		return NULL;
	if (S_ISREG(mode) || S_ISBLK(mode))
		return &mp_regular_kind;
	if (!S_ISDIR(mode) && file_can_poll((struct file *)file) &&
	    (mp_file_knows_nowait(file) || file->f_flags & O_NONBLOCK))
		return &mp_pollable_kind;
	return NULL;
}
