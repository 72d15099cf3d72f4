//! Entries of the collector's headers that are not sent.
//!
//! The library reads the headers from the environment, and leaves out what it
//! cannot read without a word; a token that is missing shows as a collector that
//! takes no spans. Values, and entries that are no entries, may be secrets: what
//! is wrong is told by its place.

use std::ffi::OsString;
use std::fmt;
use std::str::FromStr as _;

use http::{HeaderName, HeaderValue};
use percent_encoding::percent_decode_str;

/// Variables with headers, of which the library reads the first that is set.
const VARIABLES: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_HEADERS",
];

/// Fault of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
enum EntryFault {
    NoEquals,
    BadName,
    NoValue { name: String },
    BadValue { name: String },
}

impl fmt::Display for EntryFault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoEquals => formatter.write_str("it is no NAME=VALUE"),
            Self::BadName => formatter.write_str("its name is no name of a header"),
            Self::NoValue { name } => write!(formatter, "{name} has no value"),
            Self::BadValue { name } => {
                write!(
                    formatter,
                    "the value of {name} has characters that no header can have"
                )
            }
        }
    }
}

/// Warns of entries of the environment's headers that are not sent.
pub(super) fn warn_of_lost() {
    let set = |name| std::env::var_os(name).map(|value: OsString| (name, value));
    for (name, value) in VARIABLES.into_iter().filter_map(set) {
        let Ok(text) = value.into_string() else {
            tracing::warn!(
                variable = name,
                "headers for the OTLP collector are not UTF-8, and are not sent"
            );
            continue;
        };
        let faults = faults(&text);
        // A line for all, which a long variable does not make longer.
        if let Some((place, fault)) = faults.first() {
            tracing::warn!(
                variable = name,
                entries = faults.len(),
                first = format!("entry {place}: {fault}"),
                "headers for the OTLP collector cannot be read, and are not sent; the others are"
            );
        }
        return;
    }
}

/// Returns the entries that the library leaves out, by their places from 1 on.
/// Entries are separated by commas, and empty ones mean nothing.
fn faults(text: &str) -> Vec<(usize, EntryFault)> {
    let entries = text.split(',').map(str::trim).zip(1..);
    entries
        .filter(|(entry, _)| !entry.is_empty())
        .filter_map(|(entry, place)| Some((place, fault(entry)?)))
        .collect()
}

fn fault(entry: &str) -> Option<EntryFault> {
    let Some((name, value)) = entry.split_once('=') else {
        return Some(EntryFault::NoEquals);
    };
    let (name, value) = (name.trim(), value.trim());
    if HeaderName::from_str(name).is_err() {
        return Some(EntryFault::BadName);
    }
    let name = name.to_owned();
    if value.is_empty() {
        return Some(EntryFault::NoValue { name });
    }
    // A value that is not percent-encoded UTF-8 is sent as it stands.
    let decoded = percent_decode_str(value).decode_utf8();
    let decoded = decoded.unwrap_or(value.into());
    HeaderValue::from_str(&decoded)
        .is_err()
        .then_some(EntryFault::BadValue { name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_are_not_sent_are_told_without_their_values() {
        let check = |text: &str, expected: &[(usize, &str)]| {
            let found = faults(text);
            let found: Vec<_> = found
                .iter()
                .map(|(n, fault)| (*n, fault.to_string()))
                .collect();
            let found: Vec<_> = found
                .iter()
                .map(|(n, fault)| (*n, fault.as_str()))
                .collect();
            assert_eq!(found, expected, "{text}");
            assert!(!format!("{found:?}").contains("s3cret"));
        };
        for good in [
            "",
            "authorization=Bearer s3cret",
            "authorization=Bearer%20s3cret, x-team = vision",
            "a=1,,b=2,",
            "a=b=c",
            "a=%XX",
            "a=%ff",
            "a=s3crét",
        ] {
            check(good, &[]);
        }
        check("s3cret", &[(1, "it is no NAME=VALUE")]);
        check("a=1,Bearer s3cret", &[(2, "it is no NAME=VALUE")]);
        check(
            "authorization: Bearer s3cret==",
            &[(1, "its name is no name of a header")],
        );
        check("=s3cret", &[(1, "its name is no name of a header")]);
        check("authorization= ,a=1", &[(1, "authorization has no value")]);
        let bad = "the value of a has characters that no header can have";
        check("a=s3cret%0A", &[(1, bad)]);
        check("b=1, a=s3cret%7f", &[(2, bad)]);
        let many = "s3cret,".repeat(3);
        let said = "it is no NAME=VALUE";
        check(&many, &[(1, said), (2, said), (3, said)]);
    }
}
