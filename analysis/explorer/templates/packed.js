// Packed blocks of the page: deflated, in base64.

const ready = new Promise((resolve) => {
  if (document.readyState !== "loading") resolve();
  else document.addEventListener("DOMContentLoaded", resolve, { once: true });
});

// The bytes of a block, which may stand at the end of the page.
async function unpackedBlock(name) {
  await ready;
  const node = document.getElementById("data-" + name);
  if (node === null) throw new Error("this page holds no " + name);
  const text = atob(node.textContent);
  const packed = Uint8Array.from(text, (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}
