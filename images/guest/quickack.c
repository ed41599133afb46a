/*
 * quickack DEVICE ADDRESS/LENGTH - acknowledge at once on the network of ADDRESS
 *
 * TCP waits up to 40 ms of real time for a reply that can carry the ACK. An
 * emulated processor is tens of times slower than a server's, so whether its
 * replies come in time depends on how busy the host is, and with it whether
 * there is a further packet. With the route's metric `quickack` there always
 * is one. busybox's ip does not know the metric.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct request {
	struct nlmsghdr header;
	struct rtmsg route;
	char attributes[128];
};

static void add(struct request *request, int type, const void *data, size_t bytes)
{
	struct rtattr *attribute = (void *)((char *)request + NLMSG_ALIGN(request->header.nlmsg_len));

	attribute->rta_type = type;
	attribute->rta_len = RTA_LENGTH(bytes);
	memcpy(RTA_DATA(attribute), data, bytes);
	request->header.nlmsg_len = NLMSG_ALIGN(request->header.nlmsg_len) + RTA_SPACE(bytes);
}

static int fail(const char *what, int error)
{
	fprintf(stderr, "quickack: %s: %s\n", what, strerror(error));
	return 1;
}

int main(int argc, char **argv)
{
	struct request request = {
		.header = {
			.nlmsg_len = NLMSG_LENGTH(sizeof(struct rtmsg)),
			.nlmsg_type = RTM_NEWROUTE,
			.nlmsg_flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE | NLM_F_ACK,
		},
		.route = {
			.rtm_family = AF_INET,
			.rtm_table = RT_TABLE_MAIN,
			.rtm_protocol = RTPROT_KERNEL,
			.rtm_scope = RT_SCOPE_LINK,
			.rtm_type = RTN_UNICAST,
		},
	};
	struct {
		struct nlmsghdr header;
		struct nlmsgerr error;
	} reply;
	struct in_addr address, network;
	unsigned int device;
	struct {
		struct rtattr header;
		unsigned int value;
	} metric = { { RTA_LENGTH(sizeof(unsigned int)), RTAX_QUICKACK }, 1 };
	char *slash;
	int length, fd;

	slash = argc == 3 ? strchr(argv[2], '/') : NULL;
	if (!slash) {
		fprintf(stderr, "usage: quickack DEVICE ADDRESS/LENGTH\n");
		return 2;
	}
	*slash = '\0';
	length = atoi(slash + 1);
	device = if_nametoindex(argv[1]);
	if (!device)
		return fail(argv[1], errno);
	if (inet_pton(AF_INET, argv[2], &address) != 1 || length < 1 || length > 32)
		return fail(argv[2], EINVAL);
	network.s_addr = address.s_addr & htonl(~0U << (32 - length));

	request.route.rtm_dst_len = length;
	add(&request, RTA_DST, &network, sizeof(network));
	add(&request, RTA_PREFSRC, &address, sizeof(address));
	add(&request, RTA_OIF, &device, sizeof(device));
	add(&request, RTA_METRICS, &metric, sizeof(metric));

	fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	if (fd < 0)
		return fail("socket", errno);
	if (send(fd, &request, request.header.nlmsg_len, 0) < 0)
		return fail("send", errno);
	if (recv(fd, &reply, sizeof(reply), 0) < (ssize_t)sizeof(reply) ||
	    reply.header.nlmsg_type != NLMSG_ERROR)
		return fail("reply", EPROTO);
	return reply.error.error ? fail("route", -reply.error.error) : 0;
}
