/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * MegaPipe: what user space and the kernel share.
 *
 * open("/dev/megapipe") and ioctl(MP_IOC_CREATE) make a channel and return its
 * descriptor. mmap() of that descriptor, at offset 0 and over all of
 * mp_create.bytes, gives two rings: requests go down, completions come up.
 * ioctl(channel, MP_IOC_ENTER, flags) is the one crossing: it takes requests
 * from the ring, and, when asked to, waits for completions.
 *
 * A channel belongs to the thread that made it. Any other thread, and the same
 * thread after exec(), gets EPERM. Neither the descriptor nor the mapping is
 * inherited across fork().
 */
#ifndef MEGAPIPE_ABI_H
#define MEGAPIPE_ABI_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Handle numbers are chosen by user space: 0 .. MP_MAX_HANDLES - 1. */
#define MP_MAX_HANDLES		(1U << 20)

/* Ring sizes are powers of two. */
#define MP_MAX_ENTRIES		32768U

/*
 * The numbers of lwsockets that have been accepted and not registered yet start
 * here, where no descriptor reaches.
 */
#define MP_LWSOCKET_BASE	(1 << 30)

/* mp_create.flags: the optimisations to switch on for this channel. */
#define MP_BATCH		(1U << 0)
#define MP_PARTITION		(1U << 1)
#define MP_LWSOCKET		(1U << 2)

enum mp_op {
	/*
	 * Put @fd, a descriptor or the number of an lwsocket, into the channel
	 * as @handle. @cookie comes back with each of the handle's completions.
	 * @addr and @len give the CPU mask (@len bytes, as for
	 * sched_setaffinity()) of a listening socket; 0 and 0: every CPU.
	 * Completes only when it fails.
	 */
	MP_OP_REGISTER,
	/*
	 * Take @handle out, dropping what it still waits for. Its number may
	 * be used again when this completes. A descriptor stays open; an
	 * lwsocket is closed; the part of a partitioned listener that was this
	 * handle's is given up, and the connections in its queue are reset.
	 */
	MP_OP_UNREGISTER,
	/*
	 * Accept @len connections on the listening socket @handle. Each makes
	 * a completion: @result is the new descriptor (close-on-exec,
	 * non-blocking), @queued is how many connections are still waiting in
	 * the same queue. With MP_ACCEPT_LWSOCKET in @flags, in a channel with
	 * MP_LWSOCKET and on a TCP socket, @result is the number of an lwsocket,
	 * MP_LWSOCKET_BASE or more.
	 */
	MP_OP_ACCEPT,
	/*
	 * Read up to @len bytes to @addr. @result: bytes, 0 at end of file.
	 * Files that have a position: from there, and it moves; or with
	 * MP_AT_OFFSET in @flags from @cookie, and it stays.
	 */
	MP_OP_READ,
	/*
	 * Write @len bytes from @addr. Completes when all of them are in the
	 * send queue (@result == @len), or with the bytes moved (@result) and
	 * the reason for stopping (@error).
	 */
	MP_OP_WRITE,
	/* The same from @len buffers, described by struct iovec at @addr. */
	MP_OP_WRITEV,
	/* Like shutdown(SHUT_RDWR); neither frees nor unregisters. */
	MP_OP_DISCONNECT,
	/*
	 * Give the lwsocket @handle a descriptor (@result, close-on-exec,
	 * non-blocking). The handle stays what it is; from now on
	 * MP_OP_UNREGISTER leaves the connection open.
	 */
	MP_OP_CONVERT,
	/* Close the lwsocket @fd, which has not been registered. */
	MP_OP_DROP,
	MP_NR_OPS
};

/* mp_request.flags */
#define MP_ACCEPT_LWSOCKET	(1U << 0)	/* MP_OP_ACCEPT */
#define MP_AT_OFFSET		(1U << 1)	/* MP_OP_READ, _WRITE, _WRITEV */

/* One request: 32 bytes. Fields that an operation does not use must be 0. */
struct mp_request {
	__u8	op;		/* enum mp_op */
	__u8	flags;
	__u16	reserved;
	__u32	handle;
	__u64	cookie;
	__u64	addr;
	__u32	len;
	__s32	fd;
};

/* mp_completion.flags */
#define MP_MORE			(1U << 0)	/* this accept goes on */

/* One completion: 32 bytes. */
struct mp_completion {
	__u64	cookie;
	__u32	handle;
	__u8	op;		/* enum mp_op of the request */
	__u8	flags;
	__u16	reserved;
	__s32	result;		/* >= 0, or a negative errno */
	__s32	error;		/* write: negative errno of an incomplete one */
	__u32	queued;		/* accept: connections still waiting */
	__u32	reserved2;
};

/*
 * The first bytes of the mapping. Indices run freely and wrap at 2^32; the
 * slot of index i is i & (entries - 1). Each is written by one side only, and
 * the kernel checks what user space writes: a ring that would hold more than
 * its entries makes the crossing fail with EBADMSG.
 */
struct mp_shared {
	/* written by user space */
	__u32	sq_tail;	/* requests put in */
	__u32	cq_head;	/* completions taken out */
	__s64	timeout_ns;	/* for MP_ENTER_WAIT; < 0: for ever, 0: do not wait */
	__u64	reserved[6];
	/* written by the kernel */
	__u32	sq_head;	/* requests taken */
	__u32	cq_tail;	/* completions put in */
	__u64	reserved2[7];
};

struct mp_create {
	/* in */
	__u32	sq_entries;	/* requests: power of two, 1 .. MP_MAX_ENTRIES */
	__u32	cq_entries;	/* completions: likewise */
	__u32	flags;
	__u32	reserved;
	/* out */
	__u64	bytes;		/* length of the mapping */
	__u64	sq_offset;	/* of struct mp_request[sq_entries] */
	__u64	cq_offset;	/* of struct mp_completion[cq_entries] */
};

/* On /dev/megapipe: returns the descriptor of a new channel. */
#define MP_IOC_CREATE		_IOWR('p', 0xe0, struct mp_create)

/* On a channel; the argument is a set of flags, no pointer. */
#define MP_IOC_ENTER		_IO('p', 0xe1)
#define MP_ENTER_SUBMIT		(1U << 0)	/* take requests */
#define MP_ENTER_WAIT		(1U << 1)	/* wait for a completion */

#endif
