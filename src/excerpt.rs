//! Text of others in errors and log lines: a caller's or a file's words, cut at
//! a bound.
//!
//! An error that repeats a whole value is as long as its sender likes: it fills
//! logs, and a status of gRPC travels in a header, whose size clients limit (8
//! KiB by default in some).

use std::fmt;

/// Largest number of characters that are repeated: enough to recognize a name.
const CHARS_MAX: usize = 64;

/// Beginning of a text, with an ellipsis if the rest was cut.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Excerpt(String);

impl Excerpt {
    pub(crate) fn of(text: &str) -> Self {
        let Some((end, _)) = text.char_indices().nth(CHARS_MAX) else {
            return Self(text.to_owned());
        };
        Self(format!("{}…", &text[..end]))
    }

    /// Makes an excerpt of bytes that may not be text.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        // No character takes more than four bytes.
        let beginning = &bytes[..bytes.len().min(4 * (CHARS_MAX + 1))];
        Self::of(&String::from_utf8_lossy(beginning))
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Writes the text in quotes, with control characters escaped.
impl fmt::Debug for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_long_texts_are_cut() {
        let check = |text: &str, expected: &str| {
            assert_eq!(Excerpt::of(text).to_string(), expected);
            assert_eq!(Excerpt::of_bytes(text.as_bytes()).to_string(), expected);
        };
        check("", "");
        check("urgent", "urgent");
        check(&"a".repeat(64), &"a".repeat(64));
        check(&"a".repeat(65), &format!("{}…", "a".repeat(64)));
        check(&"é".repeat(10_000), &format!("{}…", "é".repeat(64)));
        check(&"🐓".repeat(64), &"🐓".repeat(64));
        check(&"🐓".repeat(65), &format!("{}…", "🐓".repeat(64)));
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_as_such() {
        let got = format!("{:?}", Excerpt::of_bytes(b"a\xff\n"));
        assert_eq!(got, "\"a\u{fffd}\\n\"");
        let long = Excerpt::of_bytes(&[0xff; 10_000]).to_string();
        assert_eq!(long.chars().count(), 65);
    }
}
