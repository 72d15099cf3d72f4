use super::*;

const LIMITS: ImageLimits = ImageLimits {
    image_bytes_max: 1000,
    image_pixels_max: 10_000,
    decode_bytes_max: 1 << 20,
};

/// Four colors (black, red, white, gray) and 2 x 2 pixels.
fn preprocessor() -> Preprocessor {
    let palette = Palette::new(vec![
        [-1.0, -1.0, -1.0],
        [1.0, -1.0, -1.0],
        [1.0, 1.0, 1.0],
        [0.0, 0.0, 0.0],
    ]);
    Preprocessor::new(&palette.unwrap(), 2, LIMITS)
}

fn tokenize(input: &ImageInput) -> Result<Box<[u16]>, String> {
    preprocessor()
        .tokenize(
            input,
            PreprocessOptions::default(),
            &DecodeBudget::endless(),
        )
        .map(|tokenized| tokenized.tokens)
        .map_err(|error| error.to_string())
}

fn rgb8(width: u32, height: u32, pixels: &[u8]) -> ImageInput {
    ImageInput::Rgb8 {
        width,
        height,
        pixels: Bytes::copy_from_slice(pixels),
    }
}

#[test]
fn pixels_become_tokens_in_raster_order() {
    let pixels = [0, 0, 0, 255, 0, 0, 255, 255, 255, 128, 128, 128];
    assert_eq!(*tokenize(&rgb8(2, 2, &pixels)).unwrap(), [0, 1, 2, 3]);
}

#[test]
fn timings_name_the_steps_taken() {
    let preprocessor = preprocessor();
    let timings = |input| {
        preprocessor
            .tokenize(
                &input,
                PreprocessOptions::default(),
                &DecodeBudget::endless(),
            )
            .unwrap()
            .timings
    };
    let pixels = timings(rgb8(1, 1, &[0; 3]));
    assert_eq!(pixels.decode, Duration::ZERO);
    let tokens = timings(ImageInput::Tokens(vec![0; 4]));
    assert_eq!(tokens, StageTimings::default());
}

#[test]
fn raw_pixels_are_checked() {
    let check = |input, expected: &str| {
        assert_eq!(tokenize(&input).unwrap_err(), expected);
    };
    check(
        rgb8(0, 5, &[]),
        "rgb8: 0 x 5 has no pixels; width and height must be at least 1",
    );
    check(
        rgb8(2, 2, &[0; 11]),
        "rgb8.pixels: the field has 11 bytes; 2 x 2 pixels of 3 bytes need 12",
    );
    check(
        rgb8(101, 100, &[]),
        "rgb8: 101 x 100 = 10100 pixels are over the limit of 10000 (--image-pixels-max)",
    );
    check(
        rgb8(u32::MAX, u32::MAX, &[]),
        "rgb8: 4294967295 x 4294967295 = 18446744065119617025 pixels are over the limit of \
         10000 (--image-pixels-max)",
    );
}

#[test]
fn tokens_are_checked() {
    let check = |ids: &[u32], expected: Result<&[u16], &str>| {
        let outcome = tokenize(&ImageInput::Tokens(ids.to_vec()));
        assert_eq!(
            outcome.as_deref().map_err(String::as_str),
            expected,
            "{ids:?}"
        );
    };
    check(&[3, 2, 1, 0], Ok(&[3, 2, 1, 0]));
    check(
        &[],
        Err("tokens.ids: the image has 0 tokens; the model needs exactly 4"),
    );
    check(
        &[0; 5],
        Err("tokens.ids: the image has 5 tokens; the model needs exactly 4"),
    );
    check(
        &[0, 0, 4, 0],
        Err(
            "tokens.ids: index 2 is 4, the start token, which is not a color; \
             leave it out, since the context SOS_SHIFTED adds it",
        ),
    );
    check(
        &[0, 5, 4, 0],
        Err("tokens.ids: index 1 is 5, outside the palette (color ids are 0 to 3)"),
    );
    check(
        &[0, 0, 0, 70_000],
        Err("tokens.ids: index 3 is 70000, outside the palette (color ids are 0 to 3)"),
    );
}
