/*
 * What the servers of the RPC-like test have in common: options, the listening
 * socket, one pinned thread per CPU, and telling whoever started them that
 * they are ready.
 *
 * The protocol is an echo: a client sends a message and gets the same bytes
 * back. Servers do not know where messages end; they return what they read.
 */
#ifndef SERVER_H
#define SERVER_H

#include <stdbool.h>
#include <stddef.h>

struct server_options {
	int port;
	int threads;
	int buffer;		/* bytes per connection, read at a time */
	bool exclusive;		/* epoll-server only */
	bool reuseport;		/* a listener for each thread; not mp-server */
	int buffers;		/* uring-server only: of one thread, 0: as many as fit */
	bool batch;		/* mp-server only, from here on */
	bool partition;
	bool lwsocket;
	int threshold;
	int accepts;
	int requests;		/* ring sizes, 0: the library's */
	int completions;
	int backlog;		/* connections that may wait to be accepted */
	int cycles;		/* mp-server: partition so often before it serves */
	bool overlap;		/* see that no CPU can be had twice */
	bool rest;		/* accept what belongs to no part, too */
	int convert;		/* make an lwsocket a descriptor after so many messages; 0: never */
	bool leave;		/* every second one then leaves its channel */
};

struct server_thread {
	const struct server_options *options;
	int index;		/* also the CPU */
	int listener;		/* the thread's own with --reuseport, else one for all */
};

/*
 * Parse the command line, listen, start a thread per CPU with @run, and serve
 * until killed. With --daemon the caller gets exit status 0 when every thread
 * has called server_ready(), and the server goes on in the background.
 */
int server_main(int argc, char **argv, const char *about, void (*run)(struct server_thread *));

/* The same for a server that works in the kernel: one thread, and no listener. */
int server_main_in_kernel(int argc, char **argv, const char *about,
			  void (*run)(struct server_thread *));

/*
 * Memory for a connection of @bytes, always as many, from this thread's own stock:
 * what one connection leaves the next one takes, and malloc() is not what is
 * compared. Not cleared; NULL if there is none.
 */
void *server_connection_get(size_t bytes);
void server_connection_put(void *connection);

/* For the buffer in it: the kernel copies whole words to it, and no odd bytes at its ends. */
#define SERVER_ALIGNED	__attribute__((aligned(16)))

/* This thread can take connections now. */
void server_ready(void);

/* Print "<what>: <reason>" and end the program with status 1. */
void server_fail(const char *what, int error) __attribute__((noreturn));

#endif
