"""Every metric of the gateway.

Label values come from small fixed sets, never from a request: a user as a label is a memory leak.
"""

from prometheus_client import Counter, Gauge

CONNECTIONS = Gauge(
    "scoreboard_gateway_connections", "Open connections: `websocket` or `sse`.", ["transport"]
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
    "scoreboard_gateway_stalled_clients",
    "Clients that do not take what was sent to them.",
    ["transport"],
)
