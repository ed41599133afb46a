// SPDX-License-Identifier: GPL-2.0
/*
 * agent - runs the grader's commands inside the guest
 *
 * Speaks frames over the virtio-serial port org.megapipe.control. A frame is
 * a header of 12 bytes (struct header, little endian) and `length` bytes:
 *
 *	to the agent	RUN	u32 uid, u32 cap, then the command for /bin/sh -c
 *			KILL	ends the running command and all that it started
 *			PING	any bytes
 *			SYSRQ	letters for /proc/sysrq-trigger, in order
 *	from the agent	HELLO	once, when the guest is ready
 *			OUTPUT	what the command wrote to stdout or stderr
 *			EXIT	i32 status (code, or minus the signal), u32 flags
 *			PONG	the bytes of the PING
 *			ERROR	text: the request was refused
 *
 * One command runs at a time. Its reply ends when its shell ends, not when
 * the last holder of its output does: a daemon that it leaves behind lives
 * on, and must have sent its output elsewhere.
 *
 * `agent /dev/ttyS1` serves that serial line instead of the port. `agent -`
 * serves the socket that is its standard input, and then leaves the
 * machine's control groups and SysRq alone: so its tests can run anywhere.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define PORT_NAME	"org.megapipe.control"
#define PORT_CLASS	"/sys/class/virtio-ports"
#define GROUP		"/sys/fs/cgroup/lab"

#define MAGIC		0x0141504dU	/* "MPA\1" on the wire */
#define MAX_PAYLOAD	(256U << 10)
#define CHUNK		(32U << 10)
#define CANNOT_START	125		/* as env(1) and timeout(1) say it */

enum {
	RUN = 1, KILL, PING, SYSRQ,
	HELLO = 16, OUTPUT, EXIT, PONG, ERROR,
};

enum {
	TRUNCATED = 1,
	KILLED = 2,
};

struct header {
	uint32_t magic;
	uint8_t type;
	uint8_t unused;
	uint16_t id;
	uint32_t length;
};

/* The command that runs; pid 0 means none. */
static struct {
	pid_t pid;
	int pidfd;
	int output;		/* -1 once the command has closed it */
	uint16_t id;
	uint32_t left;		/* output bytes that may still be sent */
	uint32_t flags;
	char group[64];		/* "" where the kernel has no cgroup2 */
} job;

static int port;
static bool in_guest;
static bool have_groups;

static void die(const char *what)
{
	fprintf(stderr, "agent: %s: %s\n", what, strerror(errno));
	exit(1);
}

static bool put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool done;

	if (fd < 0)
		return false;
	done = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	return done;
}

static void send_all(const void *data, size_t size)
{
	const char *at = data;

	while (size) {
		ssize_t n = write(port, at, size);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			die("write to the port");
		at += n;
		size -= n;
	}
}

static void reply(uint8_t type, uint16_t id, const void *data, uint32_t size)
{
	static char frame[sizeof(struct header) + MAX_PAYLOAD];
	struct header header = {
		.magic = htole32(MAGIC),
		.type = type,
		.id = htole16(id),
		.length = htole32(size),
	};

	/* In one write: the port carries each write as one buffer. */
	memcpy(frame, &header, sizeof(header));
	memcpy(frame + sizeof(header), data, size);
	send_all(frame, sizeof(header) + size);
}

__attribute__((format(printf, 2, 3)))
static void refuse(uint16_t id, const char *format, ...)
{
	char text[256];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	reply(ERROR, id, text, strlen(text));
}

/*
 * Commands live below the root group because the kernel accounts the memory
 * of sockets only there, as on a server whose services have groups.
 */
static void prepare_groups(void)
{
	static const char * const controllers[] = { "+memory", "+pids", "+cpu" };

	if (mkdir(GROUP, 0755) < 0 && errno != EEXIST)
		return;
	for (size_t i = 0; i < sizeof(controllers) / sizeof(*controllers); i++) {
		put("/sys/fs/cgroup/cgroup.subtree_control", controllers[i]);
		put(GROUP "/cgroup.subtree_control", controllers[i]);
	}
	have_groups = access(GROUP "/cgroup.procs", W_OK) == 0;
}

/* A group that still holds a daemon refuses to go and waits for a later sweep. */
static void sweep_groups(void)
{
	DIR *dir = have_groups ? opendir(GROUP) : NULL;
	struct dirent *entry;
	char path[sizeof(GROUP) + 1 + 256];

	if (!dir)
		return;
	while ((entry = readdir(dir))) {
		if (entry->d_type != DT_DIR || entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s", GROUP, entry->d_name);
		rmdir(path);
	}
	closedir(dir);
}

__attribute__((noreturn))
static void become(const char *command, uint32_t uid, int output)
{
	static char * const environment[] = {
		"PATH=/bin:/sbin", "HOME=/tmp", "TERM=dumb", "LANG=C", NULL
	};
	char procs[sizeof(job.group) + 16];
	sigset_t none;
	const char *step;

	setsid();
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	if (dup2(open("/dev/null", O_RDONLY), 0) < 0 || dup2(output, 1) < 0 || dup2(output, 2) < 0)
		_exit(CANNOT_START);

	step = "join the command's control group";
	snprintf(procs, sizeof(procs), "%s/cgroup.procs", job.group);
	if (job.group[0] && !put(procs, "0"))
		goto failed;
	/* The agent's own protection is not the command's. */
	put("/proc/self/oom_score_adj", "0");
	step = "become an ordinary user";
	if (uid && (setgroups(0, NULL) || setgid(uid) || setuid(uid)))
		goto failed;
	step = "go to /tmp";
	if (chdir("/tmp"))
		goto failed;
	step = "start /bin/sh";
	execle("/bin/sh", "sh", "-c", command, NULL, environment);
failed:
	dprintf(2, "agent: cannot %s: %s\n", step, strerror(errno));
	_exit(CANNOT_START);
}

static void start(uint16_t id, const char *payload, uint32_t size)
{
	static unsigned int count;
	static char command[MAX_PAYLOAD + 1];
	uint32_t fixed[2];
	int ends[2];

	if (job.pid)
		return refuse(id, "busy with command %u", job.id);
	if (size < sizeof(fixed))
		return refuse(id, "a RUN frame of %u bytes", size);
	memcpy(fixed, payload, sizeof(fixed));
	size -= sizeof(fixed);
	memcpy(command, payload + sizeof(fixed), size);
	command[size] = '\0';

	sweep_groups();
	job.group[0] = '\0';
	if (have_groups) {
		snprintf(job.group, sizeof(job.group), "%s/%u", GROUP, ++count);
		if (mkdir(job.group, 0755) < 0)
			return refuse(id, "mkdir %s: %s", job.group, strerror(errno));
	}
	if (pipe2(ends, O_CLOEXEC) < 0)
		return refuse(id, "pipe: %s", strerror(errno));
	job.id = id;
	job.left = le32toh(fixed[1]);
	job.flags = 0;
	job.pid = fork();
	if (job.pid == 0)
		become(command, le32toh(fixed[0]), ends[1]);
	close(ends[1]);
	if (job.pid < 0) {
		job.pid = 0;
		close(ends[0]);
		return refuse(id, "fork: %s", strerror(errno));
	}
	job.output = ends[0];
	fcntl(job.output, F_SETFL, O_NONBLOCK);
	job.pidfd = syscall(SYS_pidfd_open, job.pid, 0);
	if (job.pidfd < 0)
		die("pidfd_open");
}

/* Returns whether there may be more to read just now. */
static bool forward_output(void)
{
	static char chunk[CHUNK];
	ssize_t n = read(job.output, chunk, sizeof(chunk));

	if (n == 0) {
		close(job.output);
		job.output = -1;
	}
	if (n <= 0)
		return false;
	if (n > job.left) {
		/* Read on and drop: a blocked command could not end. */
		job.flags |= TRUNCATED;
		n = job.left;
	}
	job.left -= n;
	if (n)
		reply(OUTPUT, job.id, chunk, n);
	return true;
}

static void finish(void)
{
	uint32_t body[2];
	int status;

	if (waitpid(job.pid, &status, WNOHANG) != job.pid)
		return;
	/*
	 * All that the shell wrote is in the pipe by now. A bounded number of
	 * reads, because a daemon may be filling it at the other end for ever.
	 */
	for (int i = 0; i < 64 && job.output >= 0 && forward_output(); i++)
		;
	body[0] = htole32(WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status));
	body[1] = htole32(job.flags);
	if (job.output >= 0)
		close(job.output);
	close(job.pidfd);
	job.pid = 0;
	sweep_groups();
	reply(EXIT, job.id, body, sizeof(body));
}

static void kill_command(void)
{
	char path[sizeof(job.group) + 16];

	if (!job.pid)
		return;
	job.flags |= KILLED;
	snprintf(path, sizeof(path), "%s/cgroup.kill", job.group);
	if (job.group[0])
		put(path, "1");
	/* It may not have joined its group yet, nor even opened its session. */
	kill(-job.pid, SIGKILL);
	kill(job.pid, SIGKILL);
}

static void obey(const struct header *header, const char *payload)
{
	switch (header->type) {
	case RUN:
		start(header->id, payload, header->length);
		break;
	case KILL:
		kill_command();
		break;
	case PING:
		reply(PONG, header->id, payload, header->length);
		break;
	case SYSRQ:
		for (uint32_t i = 0; in_guest && i < header->length; i++)
			put("/proc/sysrq-trigger", (char [2]){ payload[i] });
		break;
	default:
		refuse(header->id, "unknown frame type %u", header->type);
	}
}

/* Takes whole frames out of the buffer; returns how many bytes it used up. */
static size_t obey_all(const char *buffer, size_t size)
{
	struct header header;
	size_t at = 0;
	bool junk = false;

	while (size - at >= sizeof(header)) {
		memcpy(&header, buffer + at, sizeof(header));
		header.magic = le32toh(header.magic);
		header.id = le16toh(header.id);
		header.length = le32toh(header.length);
		if (header.magic != MAGIC || header.length > MAX_PAYLOAD) {
			/* Not a frame: look for the next one, and complain once. */
			if (!junk)
				refuse(0, "malformed frame");
			junk = true;
			at++;
			continue;
		}
		if (size - at < sizeof(header) + header.length)
			break;
		obey(&header, buffer + at + sizeof(header));
		at += sizeof(header) + header.length;
		junk = false;
	}
	return at;
}

static void listen_port(void)
{
	static char buffer[2 * (sizeof(struct header) + MAX_PAYLOAD)];
	static size_t held;
	ssize_t n = read(port, buffer + held, sizeof(buffer) - held);
	size_t used;

	if (n == 0) {
		/* Nobody at the other end; the port would stay "readable". */
		if (!in_guest)
			exit(0);
		usleep(10000);
		return;
	}
	if (n < 0) {
		if (errno == EINTR || errno == EAGAIN)
			return;
		die("read from the port");
	}
	held += n;
	used = obey_all(buffer, held);
	held -= used;
	memmove(buffer, buffer + used, held);
}

/* Ports get their names from the host a moment after the driver has found them. */
static int open_named_port(void)
{
	char path[300], name[64];

	for (int tries = 0; tries < 2000; tries++) {
		DIR *dir = opendir(PORT_CLASS);
		struct dirent *entry;

		while (dir && (entry = readdir(dir))) {
			FILE *file;
			bool ours;

			snprintf(path, sizeof(path), PORT_CLASS "/%s/name", entry->d_name);
			file = fopen(path, "re");
			if (!file)
				continue;
			ours = fscanf(file, "%63s", name) == 1 && !strcmp(name, PORT_NAME);
			fclose(file);
			if (!ours)
				continue;
			snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
			closedir(dir);
			return open(path, O_RDWR | O_CLOEXEC);
		}
		if (dir)
			closedir(dir);
		usleep(5000);
	}
	errno = ENODEV;
	return -1;
}

static int open_line(const char *path)
{
	int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
	struct termios raw;

	if (fd < 0 || tcgetattr(fd, &raw) < 0)
		return -1;
	cfmakeraw(&raw);
	cfsetspeed(&raw, B115200);
	return tcsetattr(fd, TCSANOW, &raw) < 0 ? -1 : fd;
}

int main(int argc, char **argv)
{
	/* A host that goes away must not end the agent by a signal. */
	signal(SIGPIPE, SIG_IGN);

	in_guest = !(argc == 2 && !strcmp(argv[1], "-"));
	if (!in_guest)
		port = dup(STDIN_FILENO);
	else if (argc == 2)
		port = open_line(argv[1]);
	else
		port = open_named_port();
	if (port < 0)
		die("open the port");
	fcntl(port, F_SETFD, FD_CLOEXEC);
	if (in_guest) {
		/* Without it nothing can be graded: it dies last. */
		put("/proc/self/oom_score_adj", "-1000");
		prepare_groups();
	}
	reply(HELLO, 0, "", 0);

	for (;;) {
		struct pollfd fds[3] = {
			{ .fd = port, .events = POLLIN },
			{ .fd = job.pid ? job.output : -1, .events = POLLIN },
			{ .fd = job.pid ? job.pidfd : -1, .events = POLLIN },
		};

		if (poll(fds, 3, -1) < 0) {
			if (errno == EINTR)
				continue;
			die("poll");
		}
		if (fds[0].revents)
			listen_port();
		if (fds[1].fd >= 0 && fds[1].revents)
			forward_output();
		if (fds[2].fd >= 0 && fds[2].revents)
			finish();
	}
}
