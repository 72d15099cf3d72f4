//! Decoding of HPACK's Huffman code (RFC 7541, appendix B).
//!
//! The code is canonical: codes of one length follow each other in the order of
//! their symbols, so the lengths alone determine all codes.

/// Longest code in bits.
const BITS_MAX: usize = 30;
/// Symbol that ends a string; no string contains it.
const END: usize = 256;

/// Length in bits of each symbol's code.
#[rustfmt::skip]
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

/// First code of each length, and the place of its symbol among all symbols in
/// the order of their codes.
struct CodeTable {
    first: [u32; BITS_MAX + 1],
    place: [usize; BITS_MAX + 1],
    count: [u32; BITS_MAX + 1],
    symbols: [u16; 257],
}

static TABLE: CodeTable = CodeTable::new();

impl CodeTable {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "there are 257 symbols, and conversions are not const"
    )]
    const fn new() -> Self {
        let mut table = Self {
            first: [0; BITS_MAX + 1],
            place: [0; BITS_MAX + 1],
            count: [0; BITS_MAX + 1],
            symbols: [0; 257],
        };
        let (mut code, mut n_symbols, mut bits) = (0, 0, 1);
        while bits <= BITS_MAX {
            code <<= 1;
            table.first[bits] = code;
            table.place[bits] = n_symbols;
            let mut symbol = 0;
            while symbol <= END {
                if LENGTHS[symbol] as usize == bits {
                    table.symbols[n_symbols] = symbol as u16;
                    n_symbols += 1;
                    table.count[bits] += 1;
                    code += 1;
                }
                symbol += 1;
            }
            bits += 1;
        }
        table
    }
}

/// Decodes a string; none if it is not a whole number of codes and up to seven
/// bits of padding.
pub(super) fn decode(encoded: &[u8]) -> Option<Vec<u8>> {
    // No code is shorter than five bits.
    let mut decoded = Vec::with_capacity(encoded.len() * 8 / 5);
    let (mut code, mut bits) = (0_u32, 0);
    for byte in encoded {
        for shift in (0..8).rev() {
            code = code << 1 | u32::from(byte >> shift & 1);
            bits += 1;
            let offset = code.wrapping_sub(*TABLE.first.get(bits)?);
            if offset < TABLE.count[bits] {
                let place = TABLE.place[bits] + offset as usize;
                decoded.push(u8::try_from(TABLE.symbols[place]).ok()?);
                (code, bits) = (0, 0);
            }
        }
    }
    let is_padding = bits < 8 && code + 1 == 1 << bits;
    is_padding.then_some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u32> = hex.chars().filter_map(|c| c.to_digit(16)).collect();
        let pairs = digits.chunks(2);
        pairs
            .map(|pair| u8::try_from(pair[0] << 4 | pair[1]).unwrap())
            .collect()
    }

    /// Strings of RFC 7541, appendix C.
    #[test]
    fn the_examples_of_the_standard_are_decoded() {
        for (encoded, text) in [
            ("f1e3 c2e5 f23a 6ba0 ab90 f4ff", "www.example.com"),
            ("a8eb 1064 9cbf", "no-cache"),
            ("25a8 49e9 5ba9 7d7f", "custom-key"),
            ("aec3 771a 4b", "private"),
            (
                "9d29 ad17 1863 c78f 0b97 c8e9 ae82 ae43 d3",
                "https://www.example.com",
            ),
            ("", ""),
        ] {
            assert_eq!(decode(&bytes(encoded)).unwrap(), text.as_bytes(), "{text}");
        }
    }

    #[test]
    fn damaged_strings_are_refused() {
        // Eight bits of padding; padding of zeros; the symbol of the end.
        for encoded in ["ff", "a8eb 1064 9cbf ff", "00", "ffff ffff"] {
            let decoded = decode(&bytes(encoded));
            assert!(
                decoded.is_none() || encoded == "00",
                "{encoded}: {decoded:?}"
            );
        }
        // "00" is the digit 0 and three zeros, which are no padding.
        assert_eq!(decode(&[0]), None);
    }
}
