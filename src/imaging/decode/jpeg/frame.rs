//! The frame of a JPEG: its size, its components and their blocks.

use super::super::{Header, PreprocessError};

/// Largest side that libjpeg accepts.
const SIDE_MAX: u16 = 65_500;

/// Coding of a frame's coefficients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct JpegCoding {
    pub(super) progressive: bool,
    pub(super) arithmetic: bool,
}

/// Contents of the frame header.
#[derive(Debug)]
pub(super) struct JpegFrame {
    pub(super) coding: JpegCoding,
    pub(super) width: u32,
    pub(super) height: u32,
    /// Largest sampling factors of the components, horizontal and vertical.
    pub(super) sampling: (u32, u32),
    pub(super) components: Vec<JpegComponent>,
}

/// Component of a frame.
#[derive(Debug)]
pub(super) struct JpegComponent {
    pub(super) id: u8,
    /// Sampling factors, horizontal and vertical.
    pub(super) sampling: (u32, u32),
    /// Number of its quantization table.
    pub(super) table: u8,
    /// Width and height in samples.
    pub(super) size: (u32, u32),
    /// Blocks across and down.
    pub(super) blocks: (u32, u32),
    /// Blocks across and down, with those that fill up the units of scans.
    pub(super) padded: (u32, u32),
}

impl JpegFrame {
    pub(super) fn read(
        coding: JpegCoding,
        body: &[u8],
        header: Header<'_>,
    ) -> Result<Self, PreprocessError> {
        let Some((&[precision, h0, h1, w0, w1, count], rest)) = body.split_first_chunk() else {
            return Err(header.damaged("a frame header cut short"));
        };
        if precision != 8 {
            return Err(
                header.unsupported(format!("samples of {precision} bits; only 8 are supported"))
            );
        }
        let (components, rest) = rest.as_chunks::<3>();
        if components.len() != usize::from(count) || !rest.is_empty() {
            return Err(header
                .damaged("a frame header whose length does not match its number of components"));
        }
        match count {
            0 => return Err(header.damaged("no components")),
            1 | 3 | 4 => {}
            _ => {
                return Err(
                    header.unsupported(format!("{count} components; 1, 3 and 4 are supported"))
                );
            }
        }
        let (width, height) = (u16::from_be_bytes([w0, w1]), u16::from_be_bytes([h0, h1]));
        header.admit_pixels(width.into(), height.into())?;
        if width > SIDE_MAX || height > SIDE_MAX {
            return Err(header.unsupported(format!(
                "a size of {width} x {height}; the limit of a side is {SIDE_MAX}"
            )));
        }
        let factors = |sampling: u8| (u32::from(sampling >> 4), u32::from(sampling & 15));
        for &[_, sampling, _] in components {
            let (horizontal, vertical) = factors(sampling);
            if ![horizontal, vertical]
                .iter()
                .all(|side| (1..=4).contains(side))
            {
                return Err(header.damaged(format!(
                    "a component sampled {horizontal} x {vertical}; each factor must be 1 to 4"
                )));
            }
        }
        let largest = |side: fn((u32, u32)) -> u32| {
            let sides = components
                .iter()
                .map(|&[_, sampling, _]| side(factors(sampling)));
            sides.max().unwrap_or(1)
        };
        let sampling = (largest(|(h, _)| h), largest(|(_, v)| v));
        let (width, height) = (width.into(), height.into());
        let components = components
            .iter()
            .map(|&[id, factor, table]| {
                JpegComponent::new(id, factors(factor), table, (width, height), sampling)
            })
            .collect();
        let frame = Self {
            coding,
            width,
            height,
            sampling,
            components,
        };
        frame.check(header)?;
        Ok(frame)
    }

    /// Refuses sampling factors that do not divide the largest.
    fn check(&self, header: Header<'_>) -> Result<(), PreprocessError> {
        let (horizontal, vertical) = self.sampling;
        for component in &self.components {
            let (h, v) = component.sampling;
            if horizontal % h != 0 || vertical % v != 0 {
                return Err(header.unsupported(format!(
                    "a component sampled {h} x {v} where the largest is sampled {horizontal} x \
                     {vertical}"
                )));
            }
        }
        Ok(())
    }

    /// Returns the number of rows of units, 8 rows of samples for each vertical
    /// sampling factor.
    pub(super) fn unit_rows(&self) -> u32 {
        self.height.div_ceil(8 * self.sampling.1)
    }

    /// Returns the samples of all components, with those that fill up units.
    pub(super) fn padded_pixels(&self) -> u64 {
        self.components.iter().map(JpegComponent::pixels).sum()
    }
}

impl JpegComponent {
    fn new(
        id: u8,
        (h, v): (u32, u32),
        table: u8,
        (width, height): (u32, u32),
        (h_max, v_max): (u32, u32),
    ) -> Self {
        Self {
            id,
            sampling: (h, v),
            table,
            size: ((width * h).div_ceil(h_max), (height * v).div_ceil(v_max)),
            blocks: (
                (width * h).div_ceil(8 * h_max),
                (height * v).div_ceil(8 * v_max),
            ),
            padded: (
                width.div_ceil(8 * h_max) * h,
                height.div_ceil(8 * v_max) * v,
            ),
        }
    }

    /// Returns the number of samples, with those that fill up units.
    pub(super) fn pixels(&self) -> u64 {
        u64::from(self.padded.0) * u64::from(self.padded.1) * 64
    }
}
