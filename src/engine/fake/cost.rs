//! The value of the flag `serve --fake-engine`.

use std::str::FromStr;
use std::time::Duration;

use super::Script;

/// Duration of a fake run, the value of `serve --fake-engine`: a time per run
/// (`100ms`), or a time per run and a time per image (`2ms+1ms`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    pub fixed: Duration,
    pub per_row: Duration,
}

/// Longest time that is accepted; a longer one is most likely a typing error.
const COST_MAX: Duration = Duration::from_mins(1);

impl FromStr for Cost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let time = |text: &str| match humantime::parse_duration(text.trim()) {
            Ok(time) if time <= COST_MAX => Ok(time),
            _ => Err(
                "the value must be a time per run of at most 60s, such as 100ms, or a time per \
                      run and a time per image, such as 2ms+1ms"
                    .to_owned(),
            ),
        };
        let (fixed, per_row) = match text.split_once('+') {
            Some((fixed, per_row)) => (time(fixed)?, time(per_row)?),
            None => (time(text)?, Duration::ZERO),
        };
        Ok(Self { fixed, per_row })
    }
}

impl From<Cost> for Script {
    fn from(cost: Cost) -> Self {
        Self {
            delay: cost.fixed,
            delay_per_row: cost.per_row,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs() {
        let check = |text: &str, expected: Option<(u64, u64)>| {
            let cost = text.parse::<Cost>().ok();
            let micros = |time| Duration::from_micros(time);
            assert_eq!(
                cost.map(|cost| (cost.fixed, cost.per_row)),
                expected.map(|(fixed, per_row)| (micros(fixed), micros(per_row))),
                "{text:?}"
            );
        };
        check("0s", Some((0, 0)));
        check("100ms", Some((100_000, 0)));
        check("2ms+150us", Some((2_000, 150)));
        check("2ms + 1ms", Some((2_000, 1_000)));
        for text in ["", "5", "2h", "1ms+", "+1ms", "1ms+2ms+3ms"] {
            check(text, None);
        }
    }
}
