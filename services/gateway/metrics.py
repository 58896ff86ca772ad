"""Every metric of the gateway.

Label values come from small fixed sets, never from a request: a user as a label is a memory leak.
"""

from prometheus_client import Counter, Gauge, Histogram

CONNECTIONS = Gauge("scoreboard_gateway_connections", "Open connections of all kinds.")

CONNECTIONS_OF = Gauge(
    "scoreboard_gateway_transport_connections",
    "Open connections of one kind: `websocket`, `websocket-deflate` or `sse`.",
    ["transport"],
)

CONNECTIONS_MAX = Gauge(
    "scoreboard_gateway_connections_max", "How many connections the process takes at most."
)

CAPS_SHARED = Gauge(
    "scoreboard_gateway_caps_shared",
    "1 while connections of a user and an address are counted over all gateways, else 0.",
)

HANDSHAKES = Counter(
    "scoreboard_gateway_handshakes_total",
    "Requests to connect, by how they were answered.",
    ["result", "transport"],
)

CLOSES = Counter(
    "scoreboard_gateway_closes_total",
    "Connections the gateway closed, by the close code it sent; a client's own close is not one.",
    ["code"],
)

BOARDS_RECEIVED = Counter(
    "scoreboard_gateway_boards_received_total",
    "Newer boards, by what brought them first: a rise of `poll` means the channel loses messages.",
    ["source"],
)

BOARDS_DROPPED = Counter(
    "scoreboard_gateway_boards_dropped_total",
    "Boards on the channel that were not newer than the one held.",
)

BOARDS_UNREADABLE = Counter(
    "scoreboard_gateway_boards_unreadable_total",
    "Messages on the channel, or boards in Redis, that are no board.",
)

BOARD_AGE_S = Gauge(
    "scoreboard_gateway_board_age_seconds",
    "Since Redis last confirmed that the board held is the newest.",
)

BOARD_VERSION = Gauge(
    "scoreboard_gateway_board_version", "Version of the board held; differs while replicas differ."
)

FEED_CONNECTED = Gauge(
    "scoreboard_gateway_feed_connected", "1 while the subscription answers, else 0."
)

FRAMES_SENT = Counter("scoreboard_gateway_frames_sent_total", "Boards handed to the kernel.")

FRAMES_SKIPPED = Counter(
    "scoreboard_gateway_frames_skipped_total",
    "Boards not sent because the client had not taken an earlier one; it gets the newest instead.",
)

STALLED = Gauge(
    "scoreboard_gateway_stalled_clients", "Clients that do not take what was sent to them."
)

USERS = Gauge("scoreboard_gateway_users", "Users with at least one connection.")

OPENINGS = Gauge("scoreboard_gateway_openings", "Connections whose request is not complete.")

VERSIONS_MISSED = Counter(
    "scoreboard_gateway_versions_missed_total",
    "Boards never received, by the gaps between versions; newer ones came instead.",
)

SUBSCRIPTIONS = Counter(
    "scoreboard_gateway_feed_subscriptions_total",
    "Times the channel was subscribed to: once, and once after each loss of the subscription.",
)

BOARD_BYTES = Gauge("scoreboard_gateway_board_bytes", "Length of the message of the board held.")

PASS_SECONDS = Histogram(
    "scoreboard_gateway_pass_seconds",
    "From the begin to the end of sending a board to all, by transport.",
    ["transport"],
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)

PONG_SECONDS = Histogram(
    "scoreboard_gateway_pong_seconds",
    "From a ping to its pong.",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 20),
)

FRAMES_RECEIVED = Counter(
    "scoreboard_gateway_frames_received_total",
    "Frames from clients: `control`, or `data`, which they may not send.",
    ["kind"],
)
