/** Formatting of numbers. */

/** `1 zoom`, `2 zooms`, `1,024 frames`. */
export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** Format bytes as `59 KB`, `3.4 MB`, `1.2 GB`. */
export function size(bytes) {
  const [unit, divisor] = bytes >= 1e9 ? ["GB", 1e9] : bytes >= 1e6 ? ["MB", 1e6] : ["KB", 1e3];
  const amount = bytes / divisor;
  return `${amount < 10 && unit !== "KB" ? amount.toFixed(1) : Math.ceil(amount)} ${unit}`;
}

/** Format a remaining time in seconds: `5 s`, `3 min`, `1 h 20 min`. */
export function timeLeft(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.ceil(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** `4 fps`, `0.25 fps`. */
export function rate(fps) {
  return `${Number(fps.toFixed(2))} fps`;
}

/** Return the last part of a URL as a name. */
export function nameOf(url) {
  try {
    const { hostname, pathname } = new URL(url);
    return decodeURIComponent(pathname.split("/").filter(Boolean).pop() ?? hostname);
  } catch {
    return url;
  }
}

/** Format a Unix time as a day. */
export function day(seconds) {
  return new Date(seconds * 1000).toLocaleDateString("en", { day: "numeric", month: "short" });
}
