// Pictures are built into the page as bytes.
declare module "*.png" {
  const bytes: Uint8Array<ArrayBuffer>;
  export default bytes;
}
