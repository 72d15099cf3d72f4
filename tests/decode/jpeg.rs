//! Writer of JPEGs with flat blocks, in any sampling and any order of scans.

use super::seeds::Seed;

/// Sampling factors of a component: horizontal, vertical.
pub(crate) type Sampling = (u8, u8);

/// Structure of a file.
pub(crate) struct Shape<'a> {
    pub(crate) size: (u16, u16),
    pub(crate) sampling: &'a [Sampling],
    /// Components of each scan, its first and last coefficient, and its high
    /// and low bit.
    pub(crate) scans: &'a [(&'a [usize], (u8, u8), u8)],
    pub(crate) progressive: bool,
}

/// Returns the level of the block at a place, near enough to gray that no color
/// is out of range.
fn level(component: usize, x: usize, y: usize) -> i32 {
    let step = (x * 3 + y * 5 + component * 7) % 11;
    i32::try_from(step).unwrap() * 8 - 40
}

impl Shape<'_> {
    pub(crate) fn file(&self) -> Vec<u8> {
        let mut file = b"\xff\xd8".to_vec();
        let quantization = [[0].as_slice(), &[8; 64]].concat();
        segment(&mut file, 0xdb, &quantization);
        let mut frame = vec![8];
        frame.extend(self.size.1.to_be_bytes());
        frame.extend(self.size.0.to_be_bytes());
        frame.push(u8::try_from(self.sampling.len()).unwrap());
        for (id, (horizontal, vertical)) in (1..).zip(self.sampling) {
            frame.extend([id, horizontal << 4 | vertical, 0]);
        }
        segment(
            &mut file,
            if self.progressive { 0xc2 } else { 0xc0 },
            &frame,
        );
        // Differences of 0 to 11 bits in 4 bits each; and the end of a block,
        // which is all that there is of other coefficients, in one.
        let mut direct = [0_u8; 17 + 12];
        direct[4] = 12;
        for (value, symbol) in direct[17..].iter_mut().zip(0..) {
            *value = symbol;
        }
        segment(&mut file, 0xc4, &direct);
        let mut others = [0_u8; 17 + 1];
        (others[0], others[1]) = (0x10, 1);
        segment(&mut file, 0xc4, &others);
        for (components, band, bits) in self.scans {
            let mut scan = vec![u8::try_from(components.len()).unwrap()];
            for component in *components {
                scan.extend([u8::try_from(component + 1).unwrap(), 0]);
            }
            scan.extend([band.0, band.1, *bits]);
            segment(&mut file, 0xda, &scan);
            file.extend(self.scan(components, *band, *bits));
        }
        file.extend(b"\xff\xd9");
        file
    }

    fn scan(&self, components: &[usize], band: (u8, u8), bits: u8) -> Vec<u8> {
        let mut writer = Writer::default();
        let mut before = [0; 4];
        let largest =
            |of: fn(&Sampling) -> u8| usize::from(self.sampling.iter().map(of).max().unwrap());
        let (h_max, v_max) = (largest(|s| s.0), largest(|s| s.1));
        let (width, height) = (usize::from(self.size.0), usize::from(self.size.1));
        let mut block = |component: usize, x: usize, y: usize| {
            if band.0 == 0 {
                let value = level(component, x, y);
                writer.difference(value - before[component]);
                before[component] = value;
            }
            // The end of the block; a refinement of nothing is the same.
            if band.1 > 0 {
                writer.push(0, 1);
            }
        };
        if bits >> 4 > 0 && band.0 == 0 {
            return vec![0; width.div_ceil(8) * height.div_ceil(8) * 4];
        }
        if let [component] = *components {
            let (h, v) = self.sampling[component];
            let across = (width * usize::from(h)).div_ceil(8 * h_max);
            let down = (height * usize::from(v)).div_ceil(8 * v_max);
            for y in 0..down {
                for x in 0..across {
                    block(component, x, y);
                }
            }
        } else {
            for unit_y in 0..height.div_ceil(8 * v_max) {
                for unit_x in 0..width.div_ceil(8 * h_max) {
                    for &component in components {
                        let (h, v) = self.sampling[component];
                        for y in 0..usize::from(v) {
                            for x in 0..usize::from(h) {
                                let place = |unit, side: u8, at| unit * usize::from(side) + at;
                                block(component, place(unit_x, h, x), place(unit_y, v, y));
                            }
                        }
                    }
                }
            }
        }
        writer.finish()
    }
}

#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
    word: u32,
    count: u32,
}

impl Writer {
    fn push(&mut self, value: u32, bits: u32) {
        self.word = self.word << bits | value;
        self.count += bits;
        while self.count >= 8 {
            self.count -= 8;
            let byte = (self.word >> self.count).to_le_bytes()[0];
            self.bytes.push(byte);
            if byte == 0xff {
                self.bytes.push(0);
            }
        }
    }

    fn difference(&mut self, value: i32) {
        let bits = 32 - value.unsigned_abs().leading_zeros();
        self.push(bits, 4);
        let low = if value > 0 {
            value
        } else {
            value + (1 << bits) - 1
        };
        if bits > 0 {
            self.push(u32::try_from(low).unwrap(), bits);
        }
    }

    fn finish(mut self) -> Vec<u8> {
        self.push(0x7f, 7);
        self.bytes
    }
}

fn segment(file: &mut Vec<u8>, kind: u8, body: &[u8]) {
    file.extend([0xff, kind]);
    file.extend(u16::try_from(body.len() + 2).unwrap().to_be_bytes());
    file.extend(body);
}

/// Makes a JPEG of three components without subsampling.
pub(crate) fn plain(width: u16, height: u16) -> Vec<u8> {
    Shape {
        size: (width, height),
        sampling: &[(1, 1); 3],
        scans: &[(&[0, 1, 2][..], (0, 63), 0)],
        progressive: false,
    }
    .file()
}

pub(crate) fn seeds() -> Vec<Seed> {
    let all: &[usize] = &[0, 1, 2];
    let whole = &[(all, (0, 63), 0)][..];
    let apart = &[
        (&[0][..], (0, 63), 0),
        (&[1][..], (0, 63), 0),
        (&[2][..], (0, 63), 0),
    ][..];
    let progressive = &[
        (all, (0, 0), 0x01),
        (&[0][..], (1, 63), 0x01),
        (&[1][..], (1, 63), 0),
        (&[2][..], (1, 63), 0),
        (&[0][..], (1, 63), 0x10),
        (all, (0, 0), 0x10),
    ][..];
    let mut seeds = Vec::new();
    for (name, sampling) in [
        ("111", [(1, 1), (1, 1), (1, 1)]),
        ("420", [(2, 2), (1, 1), (1, 1)]),
        ("440", [(1, 2), (1, 1), (1, 1)]),
        ("411", [(4, 1), (1, 1), (1, 1)]),
        ("luma", [(1, 1), (2, 2), (2, 2)]),
        ("310", [(3, 1), (1, 1), (1, 1)]),
    ] {
        for (order, scans, progressive) in [
            ("whole", whole, false),
            ("apart", apart, false),
            ("progressive", progressive, true),
        ] {
            let shape = Shape {
                size: (52, 37),
                sampling: &sampling,
                scans,
                progressive,
            };
            seeds.push(Seed {
                name: format!("jpeg-made-{name}-{order}"),
                bytes: shape.file(),
            });
        }
    }
    seeds
}
