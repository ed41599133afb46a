/*
 * libmegapipe: the MegaPipe interface (Han et al., OSDI 2012) for user space.
 *
 * A channel belongs to the thread that made it: crossings from another thread
 * fail with -EPERM. A forked child has neither the channel's descriptor nor its
 * memory: there, every call but mp_close() crashes. There is no locking. Unless
 * said otherwise a call returns 0 or more, or a negative errno.
 *
 * The calls that name a handle are asynchronous: they put a request into the
 * channel, and its outcome comes back later from mp_dispatch() as an event.
 * Such a call itself fails only with
 *   -EBADF	the handle is not registered (or is being unregistered)
 *   -EPERM, -EBADMSG	see mp_flush()
 *   -ENOMEM	no memory to set completions aside (see mp_options.requests)
 * everything else (a closed descriptor, a bad buffer) is in the event.
 */
#ifndef MEGAPIPE_H
#define MEGAPIPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include <megapipe_abi.h>

struct mp_channel;

struct mp_options {
	/* Optimisations to switch on: MP_BATCH, MP_PARTITION, MP_LWSOCKET. */
	unsigned int flags;
	/* Ring sizes, powers of two up to MP_MAX_ENTRIES; 0: 256 and 4096. */
	unsigned int requests;
	unsigned int completions;
	/* With MP_BATCH: send requests down when so many have gathered; 0: 32. */
	unsigned int threshold;
};

/*
 * Make a channel for the calling thread. @options may be NULL (plain, default
 * sizes). Returns NULL with errno set: EINVAL (sizes, flags), ENOENT (no
 * module), ENOMEM, EMFILE.
 */
struct mp_channel *mp_create(const struct mp_options *options);

/*
 * End a channel: unregisters every handle, drops what is pending, and closes
 * the descriptors of accept events that were never dispatched. Descriptors that
 * were registered stay open; lwsockets are closed. From another thread it frees the channel all the
 * same; in a forked child, only what the child has of it; NULL is allowed.
 */
void mp_close(struct mp_channel *ch);

/* Is this the number of an lwsocket, not a descriptor? */
static inline bool mp_is_lwsocket(int fd)
{
	return fd >= MP_LWSOCKET_BASE;
}

/*
 * Put @fd, a descriptor or an lwsocket from an accept event, into the channel.
 * Returns its handle. With MP_BATCH, @fd and @mask are looked at when the request
 * goes down: do not close or change them before mp_flush() or an event of the
 * handle. @cookie comes back with every event of the handle (NULL in those of
 * requests that were made before its registration was known to have failed).
 *
 * Taken are sockets (TCP, UDP, UNIX), regular files and block devices, and what
 * can be polled and need not block: pipes, FIFOs, timerfd, signalfd, eventfd,
 * anything else that is O_NONBLOCK. A file with a position gets one of its own,
 * which begins where the descriptor's is.
 *
 * For a listening TCP socket, @mask (@mask_bytes long, as for
 * sched_setaffinity(), of any length) names the CPUs whose connections it is to
 * accept; NULL and 0: all. In a channel with MP_PARTITION the handle then has an
 * accept queue of its own, with the backlog and the options that the socket has
 * now, for handshakes that arrive on these CPUs; the socket keeps all others.
 * Without, every channel accepts from the one queue. The part goes with the
 * handle: its CPUs are given back, and connections in its queue are reset.
 *
 * If the registration fails, that is the handle's first event: op
 * MP_OP_REGISTER, result
 *   -EBADF	@fd is not open, or no lwsocket of this channel
 *   -EOPNOTSUPP	not a kind of file named above; or a listening socket with
 *		something that a part cannot have: SO_REUSEPORT, a filter, keys
 *		(TCP MD5, AO), a ULP, fast open, IP options, MPTCP
 *   -EINVAL	a mask on a socket that does not listen, or an empty one
 *   -EBUSY	another part of this listening socket has one of the CPUs
 *   -EFAULT	the mask is not readable
 *   -EMFILE	as many are held as RLIMIT_NOFILE allows descriptors
 *   -ENOMEM
 * and the handle must still be given back with mp_unregister().
 * -ENFILE: all MP_MAX_HANDLES are in use.
 */
int mp_register(struct mp_channel *ch, int fd, void *cookie, const void *mask, size_t mask_bytes);

/*
 * Take a handle out of the channel. What is pending on it is dropped: no event
 * for it will be returned any more, and connections that it has accepted but not
 * returned are closed. A descriptor stays open and usable; an lwsocket is closed.
 * A read or write of a regular file that is under way goes on alone: its buffer
 * must not be used for anything else until mp_close(), which waits for it.
 */
int mp_unregister(struct mp_channel *ch, int handle);

/*
 * Accept @count connections on a listening handle; an event for each. @result:
 * the new descriptor (non-blocking, close-on-exec); @queued: connections that
 * still wait in the same queue (TCP); @more: this request will make further
 * events. With @is_lwsocket, on a TCP socket and in a channel with MP_LWSOCKET,
 * @result is an lwsocket (mp_is_lwsocket()): to be registered, or dropped with
 * mp_drop(). An event with a negative result ends the request: -EINVAL (not
 * listening, @count is 0), -EBUSY (an accept is pending), -EMFILE, -ENFILE,
 * -ENOMEM, -ECONNABORTED.
 */
int mp_accept(struct mp_channel *ch, int handle, unsigned int count, bool is_lwsocket);

/* Close an lwsocket that has not been registered. Makes no event. */
int mp_drop(struct mp_channel *ch, int lwsocket);

/*
 * Give a registered lwsocket a descriptor: @result (non-blocking,
 * close-on-exec). The handle and what is pending on it stay; the connection is
 * the descriptor's now, and mp_unregister() leaves it open. -EINVAL: it has one.
 */
int mp_convert(struct mp_channel *ch, int handle);

/*
 * Read up to @size bytes. The buffer belongs to the kernel until the event.
 * @result: bytes read, 0 at the end of the stream, or -EFAULT (not writable),
 * -EINVAL (@size is 0), -EBUSY (a read is pending), -ECONNRESET, ...
 * Of a datagram socket, one datagram, cut off at @size. Of a file with a
 * position: fewer bytes only at its end; the position moves on.
 */
int mp_read(struct mp_channel *ch, int handle, void *buffer, size_t size);

/* The same from @offset, and the position stays. -ESPIPE: there are none. */
int mp_pread(struct mp_channel *ch, int handle, void *buffer, size_t size, int64_t offset);

/*
 * Write @size bytes. The buffer belongs to the kernel until the event, which
 * comes when all bytes are in the send queue (@result == @size), or with what
 * was moved (@result) and why it stopped (@error, a negative errno). If nothing
 * was moved, @result is the errno: -EFAULT, -EBUSY (a write is pending),
 * -EPIPE (no SIGPIPE is raised), -ECONNRESET, ... Of a datagram socket: one
 * datagram. Of a file with a position: @result == @size says that the bytes are
 * in the page cache, or on the disk with O_SYNC.
 */
int mp_write(struct mp_channel *ch, int handle, const void *buffer, size_t size);

/* The same at @offset, and the position stays. -ESPIPE: there are none. */
int mp_pwrite(struct mp_channel *ch, int handle, const void *buffer, size_t size, int64_t offset);

/*
 * The same from @count buffers, up to 1024. The array itself is read when the
 * request goes down: keep it, too, until the event. More: -EINVAL.
 */
int mp_writev(struct mp_channel *ch, int handle, const struct iovec *buffers, unsigned int count);

/*
 * Shut the connection down in both directions. Neither frees nor unregisters
 * the handle. @result: 0, -ENOTCONN, or -ENOTSOCK.
 */
int mp_disconnect(struct mp_channel *ch, int handle);

struct mp_event {
	void *cookie;		/* of the handle */
	int handle;
	enum mp_op op;		/* of the request that this is the outcome of */
	int result;
	int error;
	unsigned int queued;
	bool more;
};

/*
 * Return one event, waiting for it if need be: @timeout_ms < 0 for ever, 0 not
 * at all. Returns 1 with *@event filled, 0 when the time is over, -EINTR after
 * a signal, -EPERM or -EBADMSG as from mp_flush().
 */
int mp_dispatch(struct mp_channel *ch, struct mp_event *event, int timeout_ms);

/*
 * Send all requests that have gathered down now. Returns 0, -EPERM (not the
 * channel's thread), -EBADMSG (something has overwritten the rings' indices:
 * the channel is lost, close it), or -EAGAIN: completions that have not been
 * dispatched fill their ring, so some requests had to stay.
 */
int mp_flush(struct mp_channel *ch);

#endif
