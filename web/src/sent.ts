// Pictures as calls send them: their files as the browser keeps them, without a
// copy in each of the calls about them.

import { type DescField, type MessageInitShape, toBinary, create } from "@bufbuild/protobuf";
import { BinaryWriter, WireType } from "@bufbuild/protobuf/wire";
import { GenerateRequestSchema, ImagePrimerSchema, ImageSchema } from "./gen/imagegpt/v1/imagegpt_pb.ts";

/** Encoded fields of a message, in pieces. */
export type Encoded = readonly (Uint8Array<ArrayBuffer> | Blob)[];

/** Returns the bytes of a message in pieces. */
export function sizeOf(encoded: Encoded): number {
  return encoded.reduce((sum, piece) => sum + (piece instanceof Blob ? piece.size : piece.length), 0);
}

/** Encodes a field with a message or bytes. */
function field({ number }: DescField, content: Encoded): Encoded {
  const writer = new BinaryWriter().tag(number, WireType.LengthDelimited).uint32(sizeOf(content));
  return [writer.finish(), ...content];
}

/** Encodes the field `images` of a request. */
export function imagesOf(to: DescField, files: readonly Blob[]): Encoded {
  return files.flatMap((file) => field(to, field(ImageSchema.field.encoded, [file])));
}

/** Encodes a part of an image that is kept. */
export function primerOf(file: Blob, rest: MessageInitShape<typeof ImagePrimerSchema>): Encoded {
  const encoded = toBinary(ImagePrimerSchema, create(ImagePrimerSchema, rest));
  const image = imagesOf(ImagePrimerSchema.field.image, [file]);
  return field(GenerateRequestSchema.field.image, [encoded, ...image]);
}

/** Divides items into parts of at most `nMax`, and of at most `bytesMax` bytes
 * unless one alone has more. */
export function parts<T>(
  items: readonly T[],
  nMax: number,
  bytesMax: number,
  size: (item: T) => number,
): T[][] {
  const all: T[][] = [];
  let nBytes = 0;
  for (const item of items) {
    const last = all.at(-1);
    if (last && last.length < nMax && nBytes + size(item) <= bytesMax) {
      last.push(item);
      nBytes += size(item);
    } else {
      all.push([item]);
      nBytes = size(item);
    }
  }
  return all;
}
