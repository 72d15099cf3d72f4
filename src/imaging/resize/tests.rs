use image::metadata::Orientation;

use super::super::turn::turned;
use super::*;

fn noise(width: u32, height: u32) -> RgbImage {
    let mut state = u64::from(width) << 32 | u64::from(height) | 1;
    let pixels = (0..width as usize * height as usize * 3)
        .map(|_| {
            // The high bits of a linear congruential generator.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        })
        .collect();
    RgbImage {
        width,
        height,
        pixels,
    }
}

#[test]
fn an_image_of_the_right_size_stays() {
    let image = noise(32, 32);
    assert_eq!(resize(image.view(), 32, Fit::Squash), image);
}

#[test]
fn one_pixel_fills_the_square() {
    let image = noise(1, 1);
    for fit in [Fit::Squash, Fit::CenterCrop] {
        let resized = resize(image.view(), 32, fit);
        assert_eq!(resized.pixels, image.pixels.repeat(32 * 32));
    }
}

#[test]
fn a_flat_image_stays_flat() {
    for (width, height) in [(5, 700), (700, 5), (224, 300), (1000, 999)] {
        let image = RgbImage {
            width,
            height,
            pixels: [255, 0, 128].repeat(width as usize * height as usize),
        };
        for fit in [Fit::Squash, Fit::CenterCrop] {
            let resized = resize(image.view(), 32, fit);
            assert_eq!(resized.pixels, [255, 0, 128].repeat(32 * 32));
        }
    }
}

/// Checks that a window holds the same pixels as the whole result does there.
#[test]
fn a_window_equals_its_part_of_the_whole() {
    let check = |width, height, shorter: usize| {
        let image = noise(width, height);
        let (width, height) = (width as usize, height as usize);
        let columns = Axis::centered(width, shorter, 224);
        let rows = Axis::centered(height, shorter, 224);
        let window = resample(image.view(), &columns, &rows);
        let whole = resample(
            image.view(),
            &Axis::part(width, columns.result_len, 0..columns.result_len),
            &Axis::part(height, rows.result_len, 0..rows.result_len),
        );
        let row_bytes = whole.width as usize * 3;
        let left = usize::try_from(columns.window.start).unwrap() * 3;
        let top = usize::try_from(rows.window.start).unwrap();
        for (row, pixels) in window.pixels.chunks_exact(224 * 3).enumerate() {
            let expected = &whole.pixels[(top + row) * row_bytes + left..][..224 * 3];
            assert_eq!(pixels, expected, "{width} x {height}, row {row}");
        }
    };
    check(300, 250, 250);
    check(250, 301, 250);
    check(224, 500, 224);
    check(40, 100, 40);
    check(100, 37, 37);
    // Vertical pass first.
    check(250, 800, 250);
}

/// Checks that an image is resized as it would be after it was turned, however
/// many rows come at a time.
#[test]
fn rows_are_turned_on_their_way() {
    // Wide, tall, larger and smaller than the result, and of its size.
    let sizes = [
        (97, 40),
        (40, 97),
        (300, 33),
        (33, 300),
        (5, 3),
        (32, 70),
        (70, 32),
        (32, 32),
    ];
    for (width, height) in sizes {
        let image = noise(width, height);
        for orientation in 1..=8 {
            let turn = Turn::from(Orientation::from_exif(orientation).unwrap());
            let upright = turned(image.clone(), turn);
            for fit in [Fit::Squash, Fit::CenterCrop] {
                let expected = resize(upright.view(), 32, fit);
                for rows in [1, 2, 7, height as usize] {
                    let size = (width as usize, height as usize);
                    let mut resize = RowResize::new(size, turn, 32, fit);
                    for rows in image.pixels.chunks(rows * width as usize * 3) {
                        resize.take(rows);
                    }
                    let ours = resize.finish();
                    assert_eq!(ours, expected, "{width} x {height}, {orientation}, {fit:?}");
                }
            }
        }
    }
}

/// Checks offsets against Python's `int(round((side - 224) / 2.0))`.
#[test]
fn the_crop_is_centered_as_python_rounds() {
    let check = |source_len, shorter, result_len, start| {
        let axis = Axis::centered(source_len, shorter, 224);
        assert_eq!(axis.result_len, result_len, "{source_len} by {shorter}");
        assert_eq!(axis.window, start..start + 224, "{source_len} by {shorter}");
    };
    check(224, 224, 224, 0);
    check(225, 224, 225, 0);
    check(227, 224, 227, 2);
    check(228, 224, 228, 2);
    check(640, 427, 335, 56);
    check(4000, 1, 896_000, 447_888);
}

/// Resizes images with sides that no image should have, in little memory and
/// time.
#[test]
fn extreme_sides_are_cheap() {
    for (width, height) in [(1, 3_000_000), (3_000_000, 1)] {
        let pixels = vec![9; width as usize * height as usize * 3];
        let view = RgbView::new(width, height, &pixels).unwrap();
        for fit in [Fit::Squash, Fit::CenterCrop] {
            assert_eq!(resize(view, 32, fit).pixels, vec![9; 32 * 32 * 3]);
        }
    }
}
