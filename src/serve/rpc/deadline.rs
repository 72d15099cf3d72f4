//! Deadlines of calls from `grpc-timeout`, so that a late call ends with
//! DEADLINE_EXCEEDED.
//!
//! The worker's own deadline is a little before the caller's: late enough to
//! use the caller's time, and early enough that the answer arrives before the
//! caller gives up.

use std::time::{Duration, Instant};

use http::HeaderMap;

/// Longest time between the worker's and the caller's deadline; at most a tenth
/// of the caller's timeout.
const MARGIN_MAX: Duration = Duration::from_millis(5);

/// Returns the time by which the worker must have answered, if the caller set a
/// timeout.
pub(super) fn of(headers: &HeaderMap, now: Instant) -> Option<Instant> {
    let timeout = parse(headers.get("grpc-timeout")?.to_str().ok()?)?;
    let margin = MARGIN_MAX.min(timeout / 10);
    // A timeout that is too long to represent counts as no timeout.
    now.checked_add(timeout.saturating_sub(margin))
}

/// Resolves at the given time; never if there is none.
pub(super) async fn passed(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}

/// Parses at most eight digits and a unit, as the gRPC specification defines.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts() {
        let check = |text, expected: Option<u64>| {
            assert_eq!(parse(text), expected.map(Duration::from_nanos), "{text:?}");
        };
        check("1H", Some(3_600_000_000_000));
        check("2M", Some(120_000_000_000));
        check("3S", Some(3_000_000_000));
        check("250m", Some(250_000_000));
        check("7u", Some(7_000));
        check("8n", Some(8));
        check("", None);
        check("S", None);
        check("1", None);
        check("123456789S", None);
        check("-1S", None);
        check("1s", None);
        check("1µ", None);
    }

    #[test]
    fn the_worker_gives_up_a_little_earlier() {
        let now = Instant::now();
        let deadline = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().expect("ascii"));
            of(&headers, now).map(|at| at - now)
        };
        assert_eq!(deadline("1S"), Some(Duration::from_millis(995)));
        assert_eq!(deadline("10m"), Some(Duration::from_millis(9)));
        assert_eq!(deadline("0S"), Some(Duration::ZERO));
        assert_eq!(deadline("soon"), None);
        assert_eq!(of(&HeaderMap::new(), now), None);
    }
}
