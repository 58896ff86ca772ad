/**
 * The demo page: shows the board that live.js delivers, and adds to the score of the token's user.
 *
 * The token comes from the fragment (`/#token=…`, which no browser sends to a server) or is pasted. It
 * stays in sessionStorage: one tab, until it is closed.
 */

import { LiveScores, claimsOf, isExpired } from "./live.js";

const TOKEN_KEY = "scoreboard.token";
// The socket brings the first board; a server that cannot open one may still answer GET.
const SNAPSHOT_AFTER_MS = 1_000;
const UPDATE_TRIES = 5;
const UPDATE_TIMEOUT_MS = 15_000;
const UPDATE_FIRST_DELAY_MS = 500;
// Someone who listens to the board wants its news, not every message.
const NEWS_EVERY_MS = 5_000;

const SLIDE = { duration: 600, easing: "cubic-bezier(.2, .8, .2, 1)" };
// Of the time between two boards: where they come fast, rows come to rest before the next one.
const SLIDE_SHARE = 0.6;
const FLASH_MS = 1_600;

const page = Object.fromEntries(
  ["board", "state", "play", "user", "answer", "change", "token", "pasted", "why", "wrong", "news", "row"]
    .map((id) => [id, document.getElementById(id)]),
);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const number = new Intl.NumberFormat("en");
const ordinal = new Intl.PluralRules("en", { type: "ordinal" });
const ORDINAL_ENDING = { one: "st", two: "nd", few: "rd", other: "th" };

/* ---- the token ---- */

let token = null;
let you = null;

function takeToken(text) {
  const claims = claimsOf(text);
  if (typeof claims?.sub !== "string") {
    page.token.hidden = false;
    page.wrong.textContent = "That is not a token: it has three parts with dots between, and names a user.";
    return;
  }
  token = text;
  you = claims.sub;
  try {
    sessionStorage.setItem(TOKEN_KEY, text);
  } catch {
    // Storage may be forbidden; the token then lives as long as the page.
  }
  page.wrong.textContent = "";
  page.answer.textContent = "";
  page.token.hidden = true;
  page.play.hidden = false;
  page.user.replaceChildren(...visible(you));
  live.start();
}

function takeTokenFromAddress() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!found) return;
  history.replaceState(null, "", location.pathname + location.search);
  takeToken(found);
}

function takeStoredToken() {
  try {
    const stored = sessionStorage.getItem(TOKEN_KEY);
    if (stored) takeToken(stored);
  } catch {
    // Storage is forbidden: nothing was kept.
  }
}

function askForToken(why) {
  page.why.textContent = why;
  page.token.hidden = false;
  page.pasted.value = "";
}

/* ---- the connection, in words ---- */

const live = new LiveScores({
  url: new URL("/scores/live", location.href.replace(/^http/, "ws")).href,
  token: () => token,
});

let state = { name: "connecting" };
let boardTime = null;
let accepted = null;

const CLOSED = {
  1012: "the server restarts",
  1013: "the server is overloaded",
  4429: "too many connections",
};

live.addEventListener("state", ({ detail }) => {
  const changed = detail.name !== state.name;
  state = detail;
  if (state.name === "live") accepted = token;
  if (state.name === "token") {
    page.play.hidden = true;
    askForToken(state.expired ? "Your token expired." : "The live board needs a token.");
  }
  showState();
  if (changed && state.name !== "connecting") say(page.state.textContent);
});

function showState() {
  const [words, reason] = stateInWords();
  page.state.dataset.state = state.name;
  page.state.querySelector(".words").textContent = words;
  const asOf = state.name !== "live" && boardTime ? `board of ${boardTime.toLocaleTimeString()}` : "";
  page.state.querySelector("small").textContent = [reason, asOf].filter(Boolean).join(" · ");
}

function stateInWords() {
  switch (state.name) {
    case "live":
      return ["Live", ""];
    case "waiting": {
      const seconds = Math.max(1, Math.ceil((state.until - Date.now()) / 1000));
      return [`Reconnecting in ${seconds} s`, state.refused ? refusal() : CLOSED[state.code] ?? "the connection was lost"];
    }
    case "token":
      return [state.expired ? "Token expired" : "Not live: no token", ""];
    default:
      return ["Connecting…", ""];
  }
}

function refusal() {
  return token === accepted ? "the server does not answer" : "the server is away or refuses the token";
}

setInterval(() => state.name === "waiting" && showState(), 250);

/* ---- the board ---- */

let rows = new Map();
let newest = null;

live.addEventListener("board", ({ detail }) => show(detail));

setTimeout(async () => {
  if (newest) return;
  const answer = await fetch("/api/scores/top").catch(() => null);
  const top = answer?.ok ? await answer.json() : null;
  // The socket may have been faster in the meantime, and is never behind.
  if (top && !newest) show(top.topScores);
}, SNAPSHOT_AFTER_MS);

function show(standings) {
  // Boards may come faster than the screen can draw; only the newest one counts.
  if (newest === null || newest.drawn) requestAnimationFrame(draw);
  newest = { standings, drawn: false };
  boardTime = new Date();
  tellNews(standings);
}

let drawnAt = -SLIDE.duration / SLIDE_SHARE;

function draw() {
  newest.drawn = true;
  const now = performance.now();
  const slide = { ...SLIDE, duration: Math.min(SLIDE.duration, (now - drawnAt) * SLIDE_SHARE) };
  drawnAt = now;
  const first = rows.size === 0;
  const before = new Map([...rows].map(([user, row]) => [user, row.element.getBoundingClientRect().top]));
  const best = newest.standings[0]?.score ?? 0;
  const next = new Map();

  for (const { userId, score, rank } of newest.standings) {
    const row = rows.get(userId) ?? makeRow(userId);
    const was = row.shown;
    row.shown = { score, rank };
    row.element.classList.toggle("you", userId === you);
    if (was && !calm.matches) row.bar.animate([{ transform: `scaleX(${row.share})`, offset: 0 }], slide);
    row.share = score / best;
    row.bar.style.transform = `scaleX(${row.share})`;
    row.element.dataset.rank = rank;
    row.rank.textContent = rank;
    row.score.textContent = number.format(score);
    if (was && was.score !== score) flash(row, score - was.score);
    if (was && was.rank !== rank) point(row, rank < was.rank);
    next.set(userId, row);
  }
  rows = next;
  arrange(next.size ? [...next.values()].map((row) => row.element) : [nobody()]);
  if (!first && !calm.matches) moveRows(before, slide);
  showState();
}

function makeRow(userId) {
  const element = page.row.content.firstElementChild.cloneNode(true);
  const name = element.querySelector("bdi");
  name.replaceChildren(...visible(userId));
  name.title = name.textContent;
  return {
    element,
    rank: element.querySelector(".medal"),
    move: element.querySelector(".move"),
    cell: element.querySelector(".score"),
    score: element.querySelector(".points"),
    gain: element.querySelector(".gain"),
    bar: element.querySelector(".bar"),
    share: 0,
    shown: null,
  };
}

function nobody() {
  const element = document.createElement("tr");
  element.className = "message";
  const cell = document.createElement("td");
  cell.colSpan = 3;
  cell.textContent = "Nobody has scored yet. The first point takes the lead.";
  element.append(cell);
  return element;
}

/** A user id as nodes, with the characters that would reorder or hide text shown by their number. */
function visible(userId) {
  // ZWNJ, ZWJ and tags belong to scripts and emoji.
  const hidden = /([\p{Cc}\p{Zl}\p{Zp}]|(?![\u200c\u200d\u{e0020}-\u{e007f}])\p{Cf})/u;
  return userId.split(hidden).map((part, index) => {
    if (index % 2 === 0) return document.createTextNode(part);
    const mark = document.createElement("span");
    mark.className = "control";
    mark.textContent = `U+${part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    return mark;
  });
}

/** Puts the rows in order and moves no row that is in place: a moved one would lose the reader's selection. */
function arrange(elements) {
  elements.forEach((element, index) => {
    const there = page.board.children[index];
    if (there !== element) page.board.insertBefore(element, there ?? null);
  });
  while (page.board.children.length > elements.length) page.board.lastElementChild.remove();
}

/** Lets every row slide from where it was to where it is. */
function moveRows(before, slide) {
  for (const { element } of rows.values()) {
    for (const animation of element.getAnimations()) animation.cancel();
  }
  for (const [user, { element }] of rows) {
    const from = before.get(user);
    if (from === undefined) {
      element.animate([{ opacity: 0, transform: "translateY(1.5rem)" }, { opacity: 1 }], slide);
      continue;
    }
    const distance = from - element.getBoundingClientRect().top;
    if (Math.abs(distance) < 1) continue;
    // Whoever rises passes in front.
    const zIndex = distance > 0 ? 2 : 1;
    element.animate(
      [{ transform: `translateY(${distance}px)`, zIndex }, { transform: "none", zIndex }],
      slide,
    );
  }
}

function flash(row, difference) {
  row.cell.animate([{ backgroundColor: "var(--flash)", offset: 0 }], FLASH_MS);
  row.gain.textContent = difference > 0 ? `+${number.format(difference)}` : number.format(difference);
  const rise = calm.matches ? "none" : "translateY(-.55em)";
  row.gain.animate(
    [
      { opacity: 1, visibility: "visible", transform: "none" },
      { opacity: 1, offset: 0.6 },
      { opacity: 0, visibility: "visible", transform: rise },
    ],
    FLASH_MS,
  );
}

function point(row, up) {
  row.move.textContent = up ? "▲" : "▼";
  row.move.dataset.up = up;
  row.move.animate(
    [
      { opacity: 1, visibility: "visible" },
      { opacity: 1, offset: 0.7 },
      { opacity: 0, visibility: "visible" },
    ],
    3 * FLASH_MS,
  );
}

/* ---- news for those who listen ---- */

let told = "";
let newsTimer = 0;
let newsTime = -NEWS_EVERY_MS;

function tellNews(standings) {
  const leader = standings[0]?.userId;
  const own = standings.find(({ userId }) => userId === you)?.rank;
  if (`${leader}\n${own}` === told || newsTimer) return;
  newsTimer = setTimeout(() => {
    newsTimer = 0;
    newsTime = performance.now();
    const [best] = newest.standings;
    const mine = newest.standings.find(({ userId }) => userId === you);
    told = `${best?.userId}\n${mine?.rank}`;
    const lead = best && `${best.userId} leads with ${number.format(best.score)}.`;
    say([lead, mine && `You are ${place(mine.rank)} with ${number.format(mine.score)}.`].filter(Boolean).join(" "));
  }, Math.max(0, newsTime + NEWS_EVERY_MS - performance.now()));
}

function place(rank) {
  return `${rank}${ORDINAL_ENDING[ordinal.select(rank)]}`;
}

function say(text) {
  if (text) page.news.textContent = text;
}

/* ---- adding to the score ---- */

let busy = false;

for (const button of page.play.querySelectorAll("[data-increment]")) {
  button.addEventListener("click", async () => {
    if (busy) return;
    busy = true;
    page.play.setAttribute("aria-busy", "true");
    page.answer.textContent = await add(Number(button.dataset.increment));
    page.play.removeAttribute("aria-busy");
    busy = false;
  });
}

/** Sends one click until it is answered. Its key makes the repeats of a lost answer count once. */
async function add(increment) {
  const request = {
    method: "POST",
    headers: {
      "Authorization": `Bearer ${token}`,
      "Content-Type": "application/json",
      "Idempotency-Key": newKey(),
    },
    body: JSON.stringify({ userId: you, scoreIncrement: increment }),
  };
  for (let attempt = 0; ; attempt += 1) {
    const answer = await fetch("/api/scores/update", { ...request, signal: AbortSignal.timeout(UPDATE_TIMEOUT_MS) })
      .catch(() => null);
    if (answer && answer.status !== 503) return answerInWords(answer, increment);

    const what = answer ? "The server is busy" : "The server does not answer";
    if (attempt + 1 === UPDATE_TRIES) return `${what}. Your +${increment} may not have been added.`;
    const asked = Number(answer?.headers.get("Retry-After") ?? 0) * 1000;
    const delay = asked + Math.random() * UPDATE_FIRST_DELAY_MS * 2 ** attempt;
    page.answer.textContent = `${what}; trying again in ${Math.ceil(delay / 1000)} s.`;
    await new Promise((resolve) => setTimeout(resolve, delay));
  }
}

async function answerInWords(answer, increment) {
  const body = await answer.json().catch(() => ({}));
  const limit = answer.headers.get("X-RateLimit-Limit");
  const left = limit ? ` ${answer.headers.get("X-RateLimit-Remaining")} of ${limit} updates left.` : "";
  switch (answer.status) {
    case 200:
      return `+${increment}: your score is ${number.format(body.newScore)}.${left}`;
    case 400:
      return `Refused: ${body.message?.toLowerCase()}.${left}`;
    case 401:
      page.play.hidden = true;
      askForToken(isExpired(token) ? "Your token expired." : "The server does not accept this token.");
      return "";
    case 409:
      return "Refused: this click was already counted with another amount.";
    case 429:
      return `Quota used up: the next update is possible in ${duration(answer.headers.get("Retry-After"))}.`;
    default:
      return `The server failed (${answer.status}); the board shows whether your +${increment} was added.`;
  }
}

function duration(seconds) {
  return seconds < 100 ? `${seconds} s` : `${Math.ceil(seconds / 60)} min`;
}

function newKey() {
  // Not crypto.randomUUID: a wall screen on plain http:// has none.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/* ---- start ---- */

page.token.addEventListener("submit", (event) => {
  event.preventDefault();
  takeToken(page.pasted.value.trim());
});

page.change.addEventListener("click", () => {
  askForToken("Another token, another user.");
  page.pasted.focus();
});

addEventListener("hashchange", takeTokenFromAddress);

takeTokenFromAddress();
if (token === null) takeStoredToken();
if (token === null) live.start();
