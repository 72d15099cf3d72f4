//! The `:authority` of a block of HTTP/2 headers (HPACK, RFC 7541).

use std::ops::Range;

use http::uri::Authority;

use super::huffman;

const NAME: &[u8] = b":authority";
/// Index of `:authority` in the static table.
const STATIC_AUTHORITY: usize = 1;
/// Entries of the static table that are pseudo-headers; the entries after them
/// up to the end of the table are not.
const STATIC_PSEUDO_MAX: usize = 14;
const STATIC_MAX: usize = 61;
/// Longest string whose length a literal states in one byte.
const SHORT_MAX: usize = 126;

/// String of a block: the bytes that it takes with its length, and its text.
struct BlockString {
    all: Range<usize>,
    text: Range<usize>,
    is_huffman: bool,
}

/// Returns the place of the authority's value in a block and the literal to put
/// there, if the value must be replaced.
///
/// Entries of the dynamic table are not followed: the library stored what was
/// passed on when the entry was made, and clients take the name from the static
/// table or write it out. Pseudo-headers come first, so the search ends at the
/// first other header.
pub(super) fn replacement(block: &[u8]) -> Option<(Range<usize>, Vec<u8>)> {
    let mut at = 0;
    while let Some(&first) = block.get(at) {
        if first & 0x80 != 0 {
            at = integer(block, at, 7)?.1;
            continue;
        }
        if first & 0xe0 == 0x20 {
            // A new size of the dynamic table.
            at = integer(block, at, 5)?.1;
            continue;
        }
        let bits = if first & 0x40 != 0 { 6 } else { 4 };
        let (index, mut next) = integer(block, at, bits)?;
        let mut is_authority = index == STATIC_AUTHORITY;
        if index == 0 {
            let name = string(block, next)?;
            next = name.all.end;
            let name = decoded(block, &name)?;
            if name.first() != Some(&b':') {
                return None;
            }
            is_authority = name == NAME;
        } else if (STATIC_PSEUDO_MAX + 1..=STATIC_MAX).contains(&index) {
            return None;
        }
        let value = string(block, next)?;
        if is_authority {
            let text = decoded(block, &value)?;
            return is_replaced(&text).then(|| (value.all, literal(&text)));
        }
        at = value.all.end;
    }
    None
}

/// True for a value that a header may have and that is no authority of a URL.
fn is_replaced(text: &[u8]) -> bool {
    let is_space = |byte: Option<&u8>| byte.is_some_and(|byte| matches!(byte, b' ' | b'\t'));
    let is_value = std::str::from_utf8(text).is_ok()
        && !text.iter().any(|&b| b.is_ascii_control() && b != b'\t')
        && !is_space(text.first())
        && !is_space(text.last());
    is_value && Authority::try_from(text).is_err()
}

/// Makes the literal of an authority that is like `text` and as long.
fn literal(text: &[u8]) -> Vec<u8> {
    let kept = |&byte: &u8| match byte {
        b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'.' | b'_' => byte,
        _ => b'-',
    };
    let text = if text.is_empty() { b"-" } else { text };
    let mut literal = Vec::with_capacity(text.len() + 4);
    if text.len() <= SHORT_MAX {
        literal.extend(u8::try_from(text.len()));
    } else {
        literal.push(0x7f);
        let mut rest = text.len() - 0x7f;
        while rest >= 0x80 {
            literal.extend(u8::try_from(rest & 0x7f | 0x80));
            rest >>= 7;
        }
        literal.extend(u8::try_from(rest));
    }
    literal.extend(text.iter().map(kept));
    literal
}

fn decoded(block: &[u8], string: &BlockString) -> Option<Vec<u8>> {
    let text = &block[string.text.clone()];
    if string.is_huffman {
        huffman::decode(text)
    } else {
        Some(text.to_vec())
    }
}

fn string(block: &[u8], at: usize) -> Option<BlockString> {
    let is_huffman = block.get(at)? & 0x80 != 0;
    let (length, start) = integer(block, at, 7)?;
    let end = start.checked_add(length).filter(|&end| end <= block.len());
    Some(BlockString {
        all: at..end?,
        text: start..end?,
        is_huffman,
    })
}

/// Returns a whole number whose first byte has `bits` bits of it, and the place
/// after it; none if the block ends before, or no block can have the number.
fn integer(block: &[u8], at: usize, bits: u32) -> Option<(usize, usize)> {
    let limit = (1 << bits) - 1;
    let mut value = usize::from(*block.get(at)?) & limit;
    let mut at = at + 1;
    if value < limit {
        return Some((value, at));
    }
    // Four bytes are more than enough for a block of 16 KiB.
    for shift in [0, 7, 14, 21] {
        let byte = usize::from(*block.get(at)?);
        at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
    None
}
