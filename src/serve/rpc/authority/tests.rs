use tokio::io::AsyncReadExt as _;

use super::*;

const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

/// Literal of a string without Huffman's code.
fn raw(text: &[u8]) -> Vec<u8> {
    let mut literal = Vec::new();
    if text.len() < 127 {
        literal.push(u8::try_from(text.len()).unwrap());
    } else {
        let rest = text.len() - 127;
        assert!(rest < 128 * 128);
        literal.extend([127, u8::try_from(rest % 128).unwrap() | 128]);
        literal.push(u8::try_from(rest / 128).unwrap());
    }
    literal.extend_from_slice(text);
    literal
}

/// Frame of headers with these flags beside END_HEADERS.
fn headers(flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([HEADERS, flags | 4, 0, 0, 0, 1]);
    frame.extend_from_slice(payload);
    frame
}

/// Block as grpcio writes it: `:path`, then `:authority` with its name.
fn block(authority: &[u8]) -> Vec<u8> {
    let mut block = vec![0x40];
    block.extend(raw(b":path"));
    block.extend(raw(b"/a.B/C"));
    block.push(0x40);
    block.extend(raw(b":authority"));
    block.extend(raw(authority));
    block.extend([0x83, 0x86, 0x40]);
    block.extend(raw(b"te"));
    block.extend(raw(b"trailers"));
    block
}

/// Reader that yields pieces of at most `n` bytes.
struct Pieces<'a>(&'a [u8], usize);

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let n_bytes = self.1.min(self.0.len()).min(buffer.remaining());
        buffer.put_slice(&self.0[..n_bytes]);
        self.0 = &self.0[n_bytes..];
        Poll::Ready(Ok(()))
    }
}

async fn passed(bytes: &[u8], n: usize) -> Vec<u8> {
    let mut stream = TolerantStream::new(Pieces(bytes, n));
    let mut passed = Vec::new();
    stream.read_to_end(&mut passed).await.unwrap();
    passed
}

/// Asserts what becomes of a client's bytes, wherever they are split.
#[track_caller]
fn check(frames: &[Vec<u8>], expected: &[Vec<u8>]) {
    let all = |frames: &[Vec<u8>]| [PREFACE, SETTINGS, &frames.concat()].concat();
    let (bytes, expected) = (all(frames), all(expected));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    for n in 1..=bytes.len() {
        let passed = runtime.block_on(passed(&bytes, n));
        assert!(passed == expected, "pieces of {n}: {passed:?}");
    }
}

#[track_caller]
fn becomes(authority: &str, expected: &str) {
    let frames = |authority: &str| {
        let data = vec![0, 0, 5, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0];
        let first = headers(0, &block(authority.as_bytes()));
        // The second call refers to entries of the dynamic table.
        [
            first,
            data.clone(),
            headers(0, &[0xc0, 0xbf, 0x83, 0x86, 0xbe]),
            data,
        ]
    };
    check(&frames(authority), &frames(expected));
}

#[test]
fn authorities_of_urls_pass_unchanged() {
    for text in [
        "worker:50051",
        "a_b",
        "[::1]:50051",
        "user@host",
        "a,b",
        &"x".repeat(300),
    ] {
        becomes(text, text);
    }
}

#[test]
fn other_authorities_keep_their_length() {
    becomes("127.0.0.1:1,127.0.0.1:2", "127.0.0.1-1-127.0.0.1-2");
    becomes("127.0.0.1:1%2C127.0.0.1:2", "127.0.0.1-1-2C127.0.0.1-2");
    becomes("%5B::1%5D:1", "-5B--1-5D-1");
    becomes("/var/run/worker.sock", "-var-run-worker.sock");
    becomes("a b", "a-b");
    becomes("ümlaut", "--mlaut");
    becomes("\"{|}\"", "-----");
    let long = format!("{}/", "x".repeat(300));
    becomes(&long, &long.replace('/', "-"));
    becomes("", "-");
}

#[test]
fn values_that_no_header_has_pass_unchanged() {
    for text in ["a\nb", "a\0b", "\x7f", " ", " a", "a/b "] {
        becomes(text, text);
    }
    let frame = headers(0, &block(b"a/\xff"));
    check(std::slice::from_ref(&frame), std::slice::from_ref(&frame));
}

#[test]
fn every_form_of_the_header_is_found() {
    let expected = raw(b"a-b");
    let forms = |value: &[u8]| {
        let with = |start: &[u8]| [start, value].concat();
        let name = raw(b":authority");
        // `:authority` in Huffman's code.
        let coded = [0x88, 0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
        [
            with(&[0x41]),
            with(&[0x01]),
            with(&[0x11]),
            with(&[0x3f, 0xe1, 0x1f, 0x41]),
            with(&[&[0x40], &name[..]].concat()),
            with(&[&[0x10], &name[..]].concat()),
            with(&[&[0x40], &coded[..]].concat()),
            with(&[&[0x83, 0x86, 0x44][..], &raw(b"/p"), &[0x41]].concat()),
        ]
    };
    assert_eq!(
        huffman::decode(&[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f]).unwrap(),
        b":authority"
    );
    // "a/b" without Huffman's code and with it.
    for value in [raw(b"a/b"), vec![0x83, 0x1b, 0x11, 0xff]] {
        for (form, expected) in forms(&value).into_iter().zip(forms(&expected)) {
            check(&[headers(0, &form)], &[headers(0, &expected)]);
            // Padding, and a priority.
            let padded = |block: &[u8]| [&[2, 0, 0, 0, 0, 0], block, &[0, 0]].concat();
            check(
                &[headers(PADDED | PRIORITY, &padded(&form))],
                &[headers(PADDED | PRIORITY, &padded(&expected))],
            );
        }
    }
}

#[test]
fn damaged_frames_and_other_protocols_pass_unchanged() {
    let odd = block(b"a/b");
    for frame in [
        headers(0, &[]),
        headers(0, &odd[..10]),
        headers(0, &odd[..26]),
        headers(PADDED, &[255, 0x41, 3, b'a', b'/', b'b']),
        headers(0, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
        headers(0, &[0x41, 0x82, 0xff, 0xff]),
    ] {
        check(std::slice::from_ref(&frame), std::slice::from_ref(&frame));
        // The client closes within the frame.
        let part = frame[..frame.len() - 1].to_vec();
        check(std::slice::from_ref(&part), std::slice::from_ref(&part));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let http1 = b"PRI * HTTP/1.1\r\nhost: a,b:1\r\n\r\n";
    assert_eq!(runtime.block_on(passed(http1, 7)), http1);
    let large = headers(0, &vec![0x83; PAYLOAD_BYTES_MAX + 1]);
    let large = [PREFACE, &large[..]].concat();
    assert_eq!(runtime.block_on(passed(&large, 5000)), large);
}
