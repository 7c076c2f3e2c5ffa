/* Browsers start no Worker for pages that are opened from a disk (file:). The site's search is one: there it runs in a
   hidden frame, which has the same messages. Elsewhere nothing is changed. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      const ready = (event) => {
        if (event.source !== this.frame.contentWindow) return
        if (event.data === "worker is ready") {
          this.ready = true
          this.waiting.splice(0).forEach((data) => this.postMessage(data))
        } else {
          this.dispatchEvent(new MessageEvent("message", { data: event.data }))
        }
      }
      window.addEventListener("message", ready)
      const end = "</" + "script>"
      const own = `
        self.postMessage = (data) => parent.postMessage(data, "*")
        self.importScripts = (...urls) => urls.map((url) => {
          const script = document.createElement("script")
          script.src = url
          return new Promise((done, failed) => { script.onload = done; script.onerror = failed; document.head.append(script) })
        }).reduce((before, one) => before.then(() => one), Promise.resolve())`
      // an event of its own: messages of the page reach the frame's listeners as a worker's do
      const told = `parent.postMessage("worker is ready", "*")`
      this.frame.srcdoc = `<script>${own}${end}<script src="${new URL(url, document.baseURI)}">${end}<script>${told}${end}`
      const place = () => document.body.append(this.frame)
      document.body ? place() : document.addEventListener("DOMContentLoaded", place)
    }
    postMessage(data) {
      if (this.ready) this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
      else this.waiting.push(data)
    }
    terminate() {
      this.frame.remove()
    }
  }
}
