//! Parsers of flag values with bounds, which each flag states beside its
//! definition. All errors about a value out of bounds have one form: clap names
//! the value and the flag, and the parser names the limits.

use std::time::Duration;

use bytesize::ByteSize;

/// Longest time that a flag accepts.
pub(crate) const DAY: Duration = Duration::from_hours(24);
pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// Parses a time such as 10s that must be from `min` to `max`.
pub(crate) fn bounded_time(
    min: Duration,
    max: Duration,
) -> impl Fn(&str) -> Result<Duration, String> + Clone + Send + Sync + 'static {
    move |text| match humantime::parse_duration(text) {
        Ok(time) if (min..=max).contains(&time) => Ok(time),
        Ok(_) | Err(humantime::DurationError::NumberOverflow) => Err(out_of_bounds(
            humantime::format_duration(min),
            humantime::format_duration(max),
        )),
        Err(error) => Err(error.to_string()),
    }
}

/// Parses a size such as 64MiB that must be from `min` to `max` bytes.
pub(crate) fn bounded_size(
    min: u64,
    max: u64,
) -> impl Fn(&str) -> Result<ByteSize, String> + Clone + Send + Sync + 'static {
    move |text| match size(text)? {
        size if (min..=max).contains(&size.as_u64()) => Ok(size),
        _ => Err(out_of_bounds(ByteSize(min), ByteSize(max))),
    }
}

/// Parses a number that must be from `min` to `max`.
pub(crate) fn bounded_number(
    min: f64,
    max: f64,
) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse::<f64>() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        Ok(_) => Err(out_of_bounds(min, max)),
        Err(_) => Err("it must be a number such as 1.5".to_owned()),
    }
}

/// Parses a size such as 64MiB, without bounds.
pub(crate) fn size(text: &str) -> Result<ByteSize, String> {
    text.parse()
        .map_err(|_| "it must be a size such as 64MiB".to_owned())
}

fn out_of_bounds(min: impl std::fmt::Display, max: impl std::fmt::Display) -> String {
    format!("it must be {min} to {max}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_belong_to_what_is_allowed() {
        let time = bounded_time(SECOND, DAY);
        assert_eq!(time("1s"), Ok(SECOND));
        assert_eq!(time("24h"), Ok(DAY));
        for text in ["999ms", "25h", "584000000000years"] {
            assert_eq!(time(text).unwrap_err(), "it must be 1s to 1day", "{text}");
        }
        assert!(time("5").unwrap_err().contains("time unit needed"));
        let size = bounded_size(1 << 10, 1 << 20);
        assert_eq!(size("1KiB"), Ok(ByteSize::kib(1)));
        assert_eq!(size("1MiB"), Ok(ByteSize::mib(1)));
        for text in ["1023", "2MiB"] {
            let error = size(text).unwrap_err();
            assert_eq!(error, "it must be 1.0 KiB to 1.0 MiB", "{text}");
        }
        assert!(size("abc").unwrap_err().contains("such as 64MiB"));
        let number = bounded_number(0.0, 1.0);
        assert_eq!(number("0.5"), Ok(0.5));
        for text in ["2", "-0.1", "NaN", "inf"] {
            assert_eq!(number(text).unwrap_err(), "it must be 0 to 1", "{text}");
        }
        assert!(number("half").unwrap_err().contains("a number"));
    }
}
