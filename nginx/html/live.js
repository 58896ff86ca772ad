/**
 * The live top 10 over a WebSocket that comes back by itself; where none can be opened, over server-sent
 * events at the same address and `/sse`. No dependency: copy this file.
 *
 *     const live = new LiveScores({
 *       url: "wss://scores.example/scores/live",
 *       token: () => session.token,            // asked before every attempt; null: there is none
 *     });
 *     live.addEventListener("board", ({ detail }) => …);   // [{ userId, score, rank }, …], best first
 *     live.addEventListener("state", ({ detail }) => …);   // one of the states below
 *     live.start();                            // again after a new token; stop() ends it
 *
 * States, as { name, … }:
 *     connecting
 *     live
 *     waiting   { until, code, refused }   the next attempt is at `until` (ms since 1970); `code` closed
 *                                          the last connection; `refused`: handshakes failed in a row
 *     token     { expired }                stopped: there is no token, or it expired
 *     stopped
 *
 * The token travels in Sec-WebSocket-Protocol, so it is in no URL and no log; but with server-sent events,
 * which browsers give no header, in the URL.
 */

const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 30_000;
// A connection that lived this long was a good one: the next delay is short again.
const STABLE_MS = 10_000;
// Browsers wait for minutes on a host that does not answer.
const HANDSHAKE_MS = 10_000;
// A browser hides why a handshake failed (always 1006). One failure may be a restart; after two, look at `exp`.
const HANDSHAKES_BEFORE_DOUBT = 2;

const CLOSED_TOKEN = 4401;
// Closes after which an attempt at once would only add to the load, and the least wait for each.
const LEAST_DELAY_MS = { 1013: 5_000, 4429: 15_000 };

export class LiveScores extends EventTarget {
  #url;
  #token;
  #socket = null;
  #timer = 0;
  #attempts = 0;
  #failedHandshakes = 0;
  #waiting = false;

  constructor({ url, token }) {
    super();
    this.#url = url;
    this.#token = token;
    addEventListener("online", () => this.#waiting && this.#connect());
  }

  start() {
    this.#attempts = 0;
    this.#failedHandshakes = 0;
    this.#connect();
  }

  stop() {
    this.#leave();
    this.#tell({ name: "stopped" });
  }

  #connect() {
    this.#leave();
    const token = this.#token();
    if (!token) return this.#tell({ name: "token", expired: false });

    this.#tell({ name: "connecting" });
    // Some networks let no WebSocket through. The two take turns until one opens.
    const streams = this.#failedHandshakes % (HANDSHAKES_BEFORE_DOUBT + 1) === HANDSHAKES_BEFORE_DOUBT;
    const socket = streams
      ? new EventSource(`${this.#url.replace(/^ws/, "http")}/sse?token=${encodeURIComponent(token)}`)
      : new WebSocket(this.#url, ["scoreboard.v1", `bearer.${token}`]);
    this.#socket = socket;
    let opened = false;
    this.#timer = setTimeout(() => (streams ? socket.onerror() : socket.close()), HANDSHAKE_MS);

    socket.onopen = () => {
      opened = true;
      if (!streams) this.#failedHandshakes = 0;
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => { this.#attempts = 0; }, STABLE_MS);
      this.#tell({ name: "live" });
    };
    socket.onmessage = ({ data }) => {
      const message = JSON.parse(data);
      if (message.event === "scoresUpdate") this.#emit("board", message.topScores);
    };
    // It would try again by itself, with the same token and without telling.
    if (streams) socket.onerror = () => socket.onclose({ code: 1006 });
    socket.onclose = ({ code }) => {
      if (!opened) this.#failedHandshakes += 1;
      const refused = !opened && this.#failedHandshakes >= HANDSHAKES_BEFORE_DOUBT;
      if (code === CLOSED_TOKEN || ((refused || streams) && isExpired(token))) {
        this.#leave();
        this.#tell({ name: "token", expired: true });
      } else {
        this.#wait(code, refused);
      }
    };
  }

  #wait(code, refused) {
    this.#leave();
    // Full jitter: a restart must not bring every client back in the same moment.
    const ceiling = Math.min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** this.#attempts);
    const delay = (LEAST_DELAY_MS[code] ?? 0) + Math.random() * ceiling;
    this.#attempts += 1;
    this.#waiting = true;
    this.#timer = setTimeout(() => this.#connect(), delay);
    this.#tell({ name: "waiting", until: Date.now() + delay, code, refused });
  }

  #leave() {
    clearTimeout(this.#timer);
    this.#waiting = false;
    if (this.#socket) {
      this.#socket.onopen = this.#socket.onmessage = this.#socket.onclose = this.#socket.onerror = null;
      this.#socket.close();
      this.#socket = null;
    }
  }

  #tell(state) {
    this.#emit("state", state);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** The claims of a JWT, unverified: enough to greet its user, not to trust it. Null if it is not a JWT. */
export function claimsOf(token) {
  const [, payload, signature] = token.split(".");
  if (!payload || !signature || !/^[\w.-]+$/.test(token)) return null;
  try {
    const bytes = atob(payload.replace(/-/g, "+").replace(/_/g, "/"));
    return JSON.parse(new TextDecoder().decode(Uint8Array.from(bytes, (byte) => byte.charCodeAt(0))));
  } catch {
    return null;
  }
}

/** Whether the token's time is over by this computer's clock. */
export function isExpired(token) {
  const claims = claimsOf(token);
  return typeof claims?.exp === "number" && claims.exp * 1000 <= Date.now();
}
